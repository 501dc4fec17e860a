"""What a run found: rows and their summary, the files of a run folder, the page, several seeds."""
