"""The folder of a run: names of its files, their columns and fields, their writers and readers."""
