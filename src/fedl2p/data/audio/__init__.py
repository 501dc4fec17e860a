"""Reading and making speech: waveforms, filter banks, recordings."""
