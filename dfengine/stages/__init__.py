"""The steps from a path to a verdict, one file each; they know nothing of each other. dfengine.engine strings them."""
