"""Augmentation of training images, with separate random draws for each image.

An augmentation is called with one client's batch, on any device, and a generator on the CPU, from
which all draws are taken; a few tensor operations change the whole batch. Pixels from outside an
image are black, as in the published pipelines, which augment images before they normalise them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CropAndFlip:
    """A random window of the padded image, and a flip from left to right of every second one.

    CIFAR's usual augmentation (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2).

    Parameters
    ----------
    padding
        Black pixels on every side, from which a window of the old size is cut.
    black
        Value of a black pixel, one per channel: (0 - mean) / sd after normalisation.
    """

    padding: int = 4
    black: tuple[float, ...] = (0.0,)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch, shape (b, channels, height, width), augmented."""
        count, _, height, width = x.shape
        offsets = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator)
        flipped = _coin(count, generator)
        rows = torch.arange(height) + offsets[0]
        columns = torch.arange(width) + offsets[1]
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
        black = _black(self.black, x)
        padded = torch.nn.functional.pad(x - black, (self.padding,) * 4)
        cut = padded[
            torch.arange(count, device=x.device)[:, None, None],
            :,
            rows.to(x.device)[:, :, None],
            columns.to(x.device)[:, None, :],
        ]
        return cut.permute(0, 3, 1, 2) + black


@dataclass(frozen=True, kw_only=True)
class FlipAndRotate:
    """A flip from left to right of every second image, and a rotation about the middle.

    Pixels are taken from their nearest neighbours.

    Parameters
    ----------
    degrees
        Largest rotation, to either side.
    black
        As in :class:`CropAndFlip`.
    """

    degrees: float = 30.0
    black: tuple[float, ...] = (0.0,)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch, shape (b, channels, height, width), augmented."""
        count, _, height, width = x.shape
        flipped = _coin(count, generator)
        angle = math.radians(self.degrees) * (2 * torch.rand(count, generator=generator) - 1)
        sign = 1 - 2 * flipped.float()
        cos, sin = angle.cos(), angle.sin()
        zero = torch.zeros(count)
        # From a position in the new image to one in the old, in units of half height and width:
        # the angle is one between pixels, hence the ratio of the sides.
        matrix = torch.stack(
            [
                torch.stack([sign * cos, -sign * sin * height / width, zero], 1),
                torch.stack([sin * width / height, cos, zero], 1),
            ],
            1,
        )
        grid = torch.nn.functional.affine_grid(matrix.to(x), list(x.shape), align_corners=False)
        black = _black(self.black, x)
        moved = torch.nn.functional.grid_sample(
            x - black, grid, mode="nearest", align_corners=False
        )
        return moved + black


def _coin(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5


def _black(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1)
