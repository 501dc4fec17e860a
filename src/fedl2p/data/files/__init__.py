"""Readers of files: archives, images, pickles; downloads, and the cache of decoded data."""
