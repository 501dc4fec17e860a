"""Speech: WAV files, filter banks, the layout of Speech Commands, synthesized speakers."""
