"""Flower: records, directory of clients, nodes that several clients share."""
