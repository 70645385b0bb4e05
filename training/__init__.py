"""Makes dfengine's default bundle from portraits of real people. Imports dfengine, is never imported by it."""
