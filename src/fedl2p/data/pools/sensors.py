"""Feature shift: simulated sensors, each of which changes images in its way.

A sensor takes images of shape (n, 1, h, w) with values in [0, 1] (0 = background), a severity in
[0, 1] (0 is the mildest form of its kind, not the absence of it) and a generator, and returns
images of the same shape, again in [0, 1]. It acts on each image separately; a property of the
sensor (a direction, the place of a dead spot) is drawn once per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def apply_sensor(
    kind: str, images: Tensor, *, severity: float, generator: torch.Generator
) -> Tensor:
    """Return the images as a sensor of this kind records them.

    Parameters
    ----------
    kind
        A name in :data:`SENSORS`.
    images
        Shape (n, 1, h, w), values in [0, 1].
    severity
        In [0, 1], from the mildest to the strongest form.
    generator
        Source of the sensor's properties and of its noise.

    Returns
    -------
    Tensor
        Shape (n, 1, h, w), values in [0, 1].

    Raises
    ------
    ValueError
        If there is no such kind or the severity is out of range.
    """
    if kind not in SENSORS:
        raise ValueError(f"there is no sensor {kind!r}; the kinds are {', '.join(SENSORS)}")
    if not 0 <= severity <= 1:
        raise ValueError(f"a severity lies between 0 and 1, got {severity}")
    return SENSORS[kind](images, severity, generator).clamp(0, 1)


def warp(images: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Tensor:
    """Resample square images (bicubic, background outside) under a linear map about the centre.

    Parameters
    ----------
    images
        Shape (n, 1, h, h), values in [0, 1].
    matrix
        Shape (2, 2) or (n, 2, 2): from a position in the result, (x, y), to one in the source.
    shift
        Shape (n, 2), pixels (x, y), added to the position in the source; None for no shift.

    Returns
    -------
    Tensor
        Shape (n, 1, h, h), values in [0, 1].
    """
    theta = torch.zeros(len(images), 2, 3)
    theta[:, :, :2] = matrix
    if shift is not None:
        theta[:, :, 2] = shift * (2 / images.shape[-1])
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(
        0, 1
    )


def rotations(degrees: Tensor) -> Tensor:
    """Return rotation matrices of shape (..., 2, 2) for angles in degrees."""
    angle = torch.deg2rad(degrees)
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)


def _sign(generator: torch.Generator) -> float:
    return 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0


def _none(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x


def _inversion(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Dark strokes on bright ground; the milder, the greyer."""
    return 0.5 - (0.4 + 0.6 * severity) * (x - 0.5)


def _brightness(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Overexposed: an offset on everything, bright strokes saturate."""
    return x + 0.25 + 0.45 * severity


def _contrast(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Underexposed: strokes fade into a grey ground."""
    return 0.15 + 0.2 * severity + (0.5 - 0.35 * severity) * x


def _noise(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Independent Gaussian noise per pixel."""
    return x + (0.12 + 0.2 * severity) * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur, 0.7 to 1.3 pixels."""
    sigma = 0.7 + 0.6 * severity
    taps = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / sigma) ** 2)
    kernel = (taps[:, None] * taps)[None, None] / taps.sum() ** 2
    return torch.nn.functional.conv2d(x, kernel, padding=3)


def _thick(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Strokes swell: blend with the maximum over 3 x 3 pixels."""
    return torch.lerp(x, torch.nn.functional.max_pool2d(x, 3, 1, 1), 0.5 + 0.5 * severity)


def _thin(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Strokes shrink: blend with the minimum over the four neighbours and the pixel itself."""
    p = -torch.nn.functional.pad(x, (1, 1, 1, 1))
    across = torch.nn.functional.max_pool2d(p[:, :, 1:-1], (1, 3), 1)
    down = torch.nn.functional.max_pool2d(p[:, :, :, 1:-1], (3, 1), 1)
    return torch.lerp(x, -torch.maximum(across, down), 0.5 + 0.4 * severity)


def _rotation(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Rotate by 30 to 100 degrees, to either side: a camera that hangs askew."""
    return warp(x, rotations(torch.tensor(_sign(generator) * (30 + 70 * severity))))


def _occlusion(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Hide 3 x 3 to 4 x 4 pixels near the middle: a dead spot, black or white, in one place."""
    h, w = x.shape[-2:]
    side = round((3 + severity) * h / 8)
    top = int(torch.randint(h // 8, h - side - h // 8 + 1, (), generator=generator))
    left = int(torch.randint(w // 8, w - side - w // 8 + 1, (), generator=generator))
    hidden = x.clone()
    hidden[..., top : top + side, left : left + side] = float(_sign(generator) > 0)
    return hidden


def _illumination(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Light from one side: a bright veil that grows across the image."""
    angle = 2 * math.pi * float(torch.rand((), generator=generator))
    h, w = x.shape[-2:]
    across = torch.linspace(-1, 1, w) * math.cos(angle)
    ramp = across + torch.linspace(-1, 1, h)[:, None] * math.sin(angle)
    ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    veil = (0.5 + 0.4 * severity) * ramp
    return x * (1 - veil) + veil


def _pixelation(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Cells of 2 x 2 pixels: blend with the mean over each cell."""
    cells = torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)
    return torch.lerp(
        x,
        torch.nn.functional.interpolate(cells, x.shape[-2:], mode="nearest"),
        0.6 + 0.4 * severity,
    )


def _slant(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Shear along the lines, to either side."""
    shear = _sign(generator) * (0.4 + 0.5 * severity)
    return warp(x, torch.tensor([[1.0, shear], [0.0, 1.0]]))


SENSORS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "none": _none,
    "inversion": _inversion,
    "brightness": _brightness,
    "contrast": _contrast,
    "noise": _noise,
    "blur": _blur,
    "thick": _thick,
    "thin": _thin,
    "rotation": _rotation,
    "occlusion": _occlusion,
    "pixelation": _pixelation,
    "illumination": _illumination,
    "slant": _slant,
}
"""Every kind of sensor by name."""
