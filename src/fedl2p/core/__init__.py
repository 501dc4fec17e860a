"""The method of the paper, on any ``torch.nn.Module``.

It reads and writes no file but those of the meta-nets.
"""
