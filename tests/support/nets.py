"""Small networks that tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm and, where the shape changes, a strided shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(silu(self.norm1(self.conv1(x)))))
        return silu(h + self.shortcut(x))


class NestedNet(nn.Module):
    """The net of the golden data: 5,130 parameters in 21 tensors, 6 norms, SiLU."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(silu(self.stem(x)))
        return self.head(x.mean((2, 3)))


def nested_net(seed: int = 0, classes: int = 10) -> NestedNet:
    """Return a float64 net whose running statistics differ from their start."""
    generator = torch.Generator().manual_seed(seed)
    net = NestedNet(classes).double()
    with torch.no_grad():
        for p in net.parameters():
            fan = p[0].numel() if p.dim() > 1 else 1
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=p.dtype)
                * (0.3, fan**-0.5)[p.dim() > 1]
            )
        for name, p in net.named_parameters():
            if p.dim() == 1 and "weight" in name:
                p.add_(1.0)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                n = module.num_features
                module.running_mean.copy_(0.3 * torch.randn(n, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(n, generator=generator))
    return net
