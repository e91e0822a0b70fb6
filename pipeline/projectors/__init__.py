"""The read models: one file each. A file that is put in here is found by ``pipeline.catalogue``."""
