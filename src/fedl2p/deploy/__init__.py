"""A federation of machines: server, node, run configuration."""
