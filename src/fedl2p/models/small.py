"""The nets that the recipes train, and ``builder(shape, classes)`` of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fedl2p.models.resnet import ResNet18


class SmallConv(nn.Module):
    """Three blocks of convolution, batch-norm and ReLU, the mean over positions, a linear head.

    Parameters
    ----------
    channels
        Channels of the input images.
    classes
        Number of logits.
    widths
        Channels of the three blocks; the second halves height and width.
    """

    def __init__(
        self, channels: int, classes: int, *, widths: tuple[int, int, int] = (16, 32, 32)
    ) -> None:
        super().__init__()
        one, two, three = widths
        # A bias before a batch-norm would have no effect.
        self.conv1 = nn.Conv2d(channels, one, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(one)
        self.conv2 = nn.Conv2d(one, two, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(two)
        self.conv3 = nn.Conv2d(two, three, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(three)
        self.head = nn.Linear(three, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, height, width) to logits (n, classes)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)))
        return cast(Tensor, self.head(x.mean(dim=(2, 3))))


class ResidualBlock(nn.Module):
    """Two convolutions with batch-norm around a shortcut, projected where shapes change."""

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, width, height / stride, width / stride)."""
        h = nn.functional.silu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return nn.functional.silu(h + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem and two residual blocks, the second with a strided shortcut.

    SiLU makes it smooth everywhere, so that finite differences through many steps mean something.

    Parameters
    ----------
    channels
        Channels of the input images.
    classes
        Number of logits.
    width
        Channels of the stem and the first block; the second has twice as many.
    """

    def __init__(self, channels: int, classes: int, *, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, stride=1), ResidualBlock(width, 2 * width, stride=2)
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, height, width) to logits (n, classes)."""
        return cast(Tensor, self.head(self.blocks(self.stem(x)).mean(dim=(2, 3))))


class SmallMel(nn.Module):
    """A small net for log-mel features: three strided blocks, the mean over time, a linear head.

    Unlike the mean over the whole image, the mean over time alone tells low from high frequencies.

    Parameters
    ----------
    channels
        Channels of the input, 1 for log-mel features.
    bins
        Mel bins, the last dimension of the input.
    classes
        Number of logits.
    widths
        Channels of the three blocks; each halves time and frequency.
    """

    def __init__(
        self, channels: int, bins: int, classes: int, *, widths: tuple[int, int, int] = (8, 16, 32)
    ) -> None:
        super().__init__()
        one, two, three = widths
        self.conv1 = nn.Conv2d(channels, one, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(one)
        self.conv2 = nn.Conv2d(one, two, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(two)
        self.conv3 = nn.Conv2d(two, three, 3, stride=2, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(three)
        self.head = nn.Linear(three * -(-bins // 8), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (n, channels, frames, bins) to logits (n, classes)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)))
        return cast(Tensor, self.head(x.mean(dim=2).flatten(1)))


class SmallStrided(nn.Module):
    """Three strided blocks of convolution, batch-norm and ReLU, and a linear head on all positions.

    Parameters
    ----------
    channels
        Channels of the input.
    size
        The other dimensions of the input: (height, width) of images, (length,) of series.
    classes
        Number of logits.
    widths
        Channels of the three blocks; each halves every other dimension.
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        classes: int,
        *,
        widths: tuple[int, int, int] = (12, 24, 48),
    ) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = nn.Conv2d if len(size) == 2 else nn.Conv1d
        norm: Callable[..., nn.Module] = nn.BatchNorm2d if len(size) == 2 else nn.BatchNorm1d
        one, two, three = widths
        kernel = 3 if len(size) == 2 else 5
        shape = {"kernel_size": kernel, "stride": 2, "padding": kernel // 2, "bias": False}
        self.conv1, self.norm1 = conv(channels, one, **shape), norm(one)
        self.conv2, self.norm2 = conv(one, two, **shape), norm(two)
        self.conv3, self.norm3 = conv(two, three, **shape), norm(three)
        self.head = nn.Linear(three * math.prod(-(-n // 8) for n in size), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, channels, ...) to logits (n, classes)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)))
        return cast(Tensor, self.head(x.flatten(1)))


def small_conv(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a :class:`SmallConv` for images of shape (channels, height, width)."""
    return SmallConv(_channels(shape, "small_conv"), classes)


def small_resnet(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a :class:`SmallResNet` for images of shape (channels, height, width)."""
    return SmallResNet(_channels(shape, "small_resnet"), classes)


def small_mel(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a :class:`SmallMel` for log-mel features of shape (channels, frames, bins)."""
    return SmallMel(_channels(shape, "small_mel"), shape[2], classes)


def small_strided(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a :class:`SmallStrided` for images (channels, height, width) or series."""
    if len(shape) not in (2, 3):
        raise ValueError(
            f"small_strided wants images of shape (channels, height, width) or series of shape "
            f"(channels, length), got examples of shape {tuple(shape)}; name another model or "
            "reshape the data"
        )
    return SmallStrided(shape[0], shape[1:], classes)


def resnet18_cifar(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a ResNet-18 for small images: 3 x 3 stem of stride 1, no pooling."""
    return ResNet18(_channels(shape, "resnet18_cifar"), classes, stem="cifar")


def resnet18_imagenet(shape: Sequence[int], classes: int) -> nn.Module:
    """Return torchvision's ResNet-18: 7 x 7 stem of stride 2 and max-pooling."""
    return ResNet18(_channels(shape, "resnet18_imagenet"), classes, stem="imagenet")


def resnet18_speech(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a ResNet-18 for log-mel filter banks: 7 x 7 stem of stride 2, no pooling."""
    return ResNet18(_channels(shape, "resnet18_speech"), classes, stem="speech")


def resnet18_cifar_coarse(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a thin resnet18_cifar on images of a quarter of the size, for trials."""
    channels = _channels(shape, "resnet18_cifar_coarse")
    return ResNet18(channels, classes, stem="cifar", width=8, coarse=4)


def resnet18_imagenet_coarse(shape: Sequence[int], classes: int) -> nn.Module:
    """Return resnet18_imagenet, whose checkpoint it takes, on images of an eighth of the size."""
    channels = _channels(shape, "resnet18_imagenet_coarse")
    return ResNet18(channels, classes, stem="imagenet", coarse=8)


def resnet18_speech_coarse(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a thin resnet18_speech on filter banks of a quarter of the size, for trials."""
    channels = _channels(shape, "resnet18_speech_coarse")
    return ResNet18(channels, classes, stem="speech", width=8, coarse=4)


def _channels(shape: Sequence[int], name: str) -> int:
    if len(shape) != 3:
        raise ValueError(
            f"{name} wants images of shape (channels, height, width), got examples of shape "
            f"{tuple(shape)}; name another model or reshape the data"
        )
    return shape[0]
