"""The inner loop: mini-batches, SGD steps, stacks of clients."""
