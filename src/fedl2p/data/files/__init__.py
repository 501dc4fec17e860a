"""Files: cache, downloads, archives, readers."""
