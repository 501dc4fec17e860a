"""A torch.nn.Module as a function of named tensors, with mixed batch-norm."""
