"""ResNet-18 with three stems, by torchvision's names and numerics.

K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
https://arxiv.org/abs/1512.03385: a stem, four stages of two basic blocks with 64, 128, 256 and 512
channels, the mean over positions, a linear head. Parameters are named as in torchvision's model, so
that its checkpoints load; 11,689,512 of them with the ImageNet stem and 1,000 classes.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stem = Literal["imagenet", "cifar", "speech"]

HEAD = ("fc.weight", "fc.bias")


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, which is projected where shapes change."""

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, width, height / stride, width / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18 for images or log-mel filter banks.

    Weights begin as torchvision's: convolutions from Kaiming's normal distribution (fan out), norm
    layers at 1 and 0, the head as torch's linear layers.

    Parameters
    ----------
    channels
        Channels of the input.
    classes
        Number of logits.
    stem
        imagenet: 7 x 7, stride 2, then max-pooling of 3 x 3, stride 2. cifar: 3 x 3, stride 1,
        without pooling. speech: 7 x 7, stride 2, without pooling.
    width
        Channels of the stem and the first stage; every further stage has twice as many.
    coarse
        Side of the squares of pixels that are averaged before the stem; 1 for none.
    """

    def __init__(
        self, channels: int, classes: int, *, stem: Stem, width: int = 64, coarse: int = 1
    ) -> None:
        super().__init__()
        self.coarse = coarse
        widths = [width * 2**i for i in range(4)]
        size, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(
            channels, widths[0], size, stride=stride, padding=size // 2, bias=False
        )
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool: nn.Module = (
            nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        )
        self.layer1 = _stage(widths[0], widths[0], stride=1)
        self.layer2 = _stage(widths[0], widths[1], stride=2)
        self.layer3 = _stage(widths[1], widths[2], stride=2)
        self.layer4 = _stage(widths[2], widths[3], stride=2)
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, channels, height, width) to logits (n, classes)."""
        if self.coarse > 1:
            x = F.avg_pool2d(x, self.coarse)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.fc(x.mean(dim=(2, 3))))


def _stage(channels: int, width: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(channels, width, stride=stride), BasicBlock(width, width, stride=1)
    )


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a torchvision checkpoint of ResNet-18 into a model, in place.

    Every tensor must fit by name and shape but the head's: that of a model for another number of
    classes stays as it is.

    Parameters
    ----------
    model
        A :class:`ResNet18`, or a model with torchvision's names.
    path
        The file, e.g. ``resnet18-f37072fd.pth``; a ``state_dict`` written by ``torch.save``. It is
        read with ``weights_only``: nothing in it is executed.

    Raises
    ------
    ValueError
        If the file is missing or damaged, holds anything but named tensors, or does not fit; the
        model is unchanged then.
    """
    weights = _read(path)
    current = model.state_dict()
    for name in HEAD:
        if name in weights and name in current and weights[name].shape != current[name].shape:
            weights[name] = current[name]
    expected = {name: tuple(t.shape) for name, t in current.items()}
    given = {name: tuple(t.shape) for name, t in weights.items()}
    # Checkpoints from before torch 0.4.1 have no counts of batches, and nothing needs them.
    counts = {name for name in expected if name.endswith("num_batches_tracked")}
    for name in sorted((expected.keys() | given.keys()) - counts):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"{path} does not fit the model: {name} is {_shape(given.get(name))} in the file "
                f"and {_shape(expected.get(name))} in the model; give a checkpoint of that model"
            )
    model.load_state_dict({**current, **weights})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"there is no file {path}; get torchvision's ResNet-18 with `fedl2p data get "
            "resnet18-imagenet`"
        ) from None
    except UnpicklingError:
        raise ValueError(
            f"{path} is no file of weights, or holds more than tensors, and was not read; get "
            "torchvision's with `fedl2p data get resnet18-imagenet`"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as problem:
        why = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise ValueError(
            f"{path} is damaged or cut off ({why}); delete it and fetch it again"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items()
    ):
        raise ValueError(f"{path} does not hold named tensors; give a saved state_dict")
    return dict(content)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
