"""From a folder of videos or photos to a bundle. Imports dfengine, is never imported by it."""
