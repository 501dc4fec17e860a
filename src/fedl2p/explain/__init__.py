"""One client's settings explained."""
