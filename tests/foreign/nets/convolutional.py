"""Convolutional nets with batch-norm in the forms in which they are published and wrapped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreign.nets.case import Case, seeded


class Residual(nn.Module):
    """A basic block with a strided shortcut, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(2, 4, 1, stride=2), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.bn1(self.conv1(x)))
        h = F.silu(self.bn2(self.conv2(h)) + self.downsample(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(h, 1), 1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(2, 6, 1, bias=False),
            nn.BatchNorm2d(6, eps=1e-3, momentum=0.01),
            nn.Hardswish(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.BatchNorm2d(6, eps=1e-3, momentum=0.01),
            nn.SiLU(),
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 2, 1), nn.SiLU(), nn.Conv2d(2, 6, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(6, 2, 1, bias=False), nn.BatchNorm2d(2))
        self.classifier = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        h = self.project(h * self.excite(h)) + x
        return self.classifier(h.mean((2, 3)))


class WeightTied(nn.Module):
    """Two layers that share a weight, and a norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.second = nn.Sequential(nn.Linear(5, 5, bias=False), self.first[1])
        self.second[0].weight = self.first[0].weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class DenselyNormed(nn.Module):
    """Norm before activation and convolution, over one dimension, with concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(5)])
        self.convs = nn.ModuleList([nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(5, 3, 3, padding=1)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.tanh(norm(x)))], 1)
        return self.head(x.mean(2))


def frozen_backbone() -> nn.Module:
    """Return a residual net of which only the last block and the head are trained."""
    net = Residual()
    net.conv1.requires_grad_(False)
    net.bn1.requires_grad_(False)
    return net


def without_affine() -> nn.Module:
    """Return a net whose norm has no weights of its own."""
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))


CASES = {
    "residual": Case(build=seeded(Residual), shape=(2, 6, 6)),
    "inverted residual": Case(build=seeded(InvertedResidual), shape=(2, 5, 5)),
    "dense, 1-d": Case(build=seeded(DenselyNormed), shape=(2, 6)),
    "weight-tied": Case(build=seeded(WeightTied), shape=(5,)),
    "frozen backbone": Case(build=seeded(frozen_backbone), shape=(2, 6, 6)),
    "norm without affine": Case(build=seeded(without_affine), shape=(5,)),
    "SyncBatchNorm": Case(
        build=seeded(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Residual())), shape=(2, 6, 6)
    ),
    "DataParallel": Case(build=seeded(lambda: nn.DataParallel(Residual())), shape=(2, 6, 6)),
    "compiled": Case(
        build=lambda: torch.compile(seeded(Residual)(), backend="eager"), shape=(2, 6, 6)
    ),
}
if torch.cuda.is_available():  # torch's DataParallel refuses to run on a CPU there
    del CASES["DataParallel"]
