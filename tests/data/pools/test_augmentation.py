"""Augmentation: every image by a draw of its own, all of them among what is possible."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedl2p.data.pools.augmentation import CropAndFlip, FlipAndRotate
from fedl2p.data.pools.shared_pool import Normalise

NORMALISE = Normalise(mean=(0.5, 0.4, 0.3), sd=(0.2, 0.3, 0.4))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, height: int = 6, width: int = 8) -> Tensor:
    return torch.rand(count, 3, height, width, generator=rng(9))


def windows(image: Tensor, padding: int, black: Tensor) -> dict[tuple[int, int, bool], Tensor]:
    """All that cropping and flipping can give, by torch's own padding and slicing."""
    _, height, width = image.shape
    padded = torch.stack(
        [F.pad(c, (padding,) * 4, value=float(b)) for c, b in zip(image, black, strict=True)]
    )
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, top : top + height, left : left + width]
            found[top, left, False] = window
            found[top, left, True] = window.flip(2)
    return found


def test_every_crop_is_one_of_the_possible_ones_and_all_come() -> None:
    black = torch.tensor([-0.5, 0.25, 2.0])
    x = images(2)
    augment = CropAndFlip(padding=1, black=tuple(black.tolist()))
    out = augment(x.repeat_interleave(300, 0), rng())
    assert out.shape == (600, 3, 6, 8)
    for i, image in enumerate(x):
        possible = windows(image, 1, black)
        counts = dict.fromkeys(possible, 0)
        for made in out[300 * i : 300 * (i + 1)]:
            (key,) = [k for k, v in possible.items() if torch.allclose(v, made, atol=1e-6)]
            counts[key] += 1
        assert min(counts.values()) > 0
        assert 110 < sum(n for (_, _, flipped), n in counts.items() if flipped) < 190
    assert not torch.equal(out[:300], out[300:])


def test_black_is_what_normalisation_makes_of_zero() -> None:
    zero = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    expected = NORMALISE(zero.numpy())[0, :, 0, 0]
    torch.testing.assert_close(torch.tensor(NORMALISE.black), expected)
    x = NORMALISE(torch.full((50, 3, 8, 8), 200, dtype=torch.uint8).numpy())
    for augment in (CropAndFlip(black=NORMALISE.black), FlipAndRotate(black=NORMALISE.black)):
        out = augment(x, rng())
        is_black = torch.isclose(out, expected.view(1, 3, 1, 1), atol=1e-5)
        assert bool((is_black | torch.isclose(out, x, atol=1e-5)).all())
        assert bool(is_black.any())


def test_a_rotation_by_nothing_is_a_flip_of_half_of_them() -> None:
    x = images(400)
    out = FlipAndRotate(degrees=0)(x, rng())
    same = torch.isclose(out, x).flatten(1).all(1)
    flipped = torch.isclose(out, x.flip(3)).flatten(1).all(1)
    assert bool((same ^ flipped).all())
    assert 150 < int(flipped.sum()) < 250


def test_rotations_turn_by_all_angles_to_either_side() -> None:
    """The direction of a bright ray from the middle tells the angle."""
    size = 101
    x = torch.zeros(1, 1, size, size)
    x[..., : size // 2, size // 2] = 1  # upwards: a flip does not change it
    out = FlipAndRotate(degrees=30)(x.expand(400, -1, -1, -1), rng())
    at = torch.arange(size) - size // 2
    mass = out[:, 0]
    horizontal = (mass * at).sum((1, 2)) / mass.sum((1, 2))
    vertical = (mass * at[:, None]).sum((1, 2)) / mass.sum((1, 2))
    degrees = torch.atan2(horizontal, -vertical) * 180 / math.pi
    assert -30.5 < float(degrees.min()) < -27
    assert 27 < float(degrees.max()) < 30.5
    assert abs(float(degrees.mean())) < 3
    # uniform: a third of them within a third of the range
    assert 0.25 < float((degrees.abs() < 10).float().mean()) < 0.42


def test_a_rotation_keeps_angles_where_sides_differ() -> None:
    """A disk stays a disk."""
    at = torch.arange(41.0) - 20
    disk = (at[:, None] ** 2 + (torch.arange(81.0) - 40) ** 2 < 15**2).float()[None, None]
    out = FlipAndRotate(degrees=30)(disk.expand(50, -1, -1, -1), rng())
    assert float((out - disk).abs().mean(dim=(1, 2, 3)).max()) < 0.02


@pytest.mark.parametrize("augment", [CropAndFlip(), FlipAndRotate()])
def test_only_the_generator_decides(augment: CropAndFlip | FlipAndRotate) -> None:
    x = images(20)
    before = x.clone()
    state = torch.get_rng_state()
    first = augment(x, rng(1))
    assert torch.equal(first, augment(x, rng(1)))
    assert not torch.equal(first, augment(x, rng(2)))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert augment(x.double(), rng(1)).dtype == torch.float64
