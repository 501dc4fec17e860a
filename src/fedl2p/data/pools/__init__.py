"""Clients over one pool of examples: partitioning, sensors, augmentation, opened clients."""
