"""Dealing one pool of examples to clients."""
