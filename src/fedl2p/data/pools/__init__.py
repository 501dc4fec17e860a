"""Assigning the examples of one pool to clients, and what their sensors do to them."""
