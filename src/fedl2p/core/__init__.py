"""The method of the paper, on any ``torch.nn.Module``.

Nothing here knows of federation, data sets or files, but for the meta-nets' own.
"""
