"""Gaussian noise: repeatable for studies, unpredictable for real federations."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedl2p.seeds import generator

Array = np.ndarray[Any, np.dtype[np.float64]]

Gaussian = Callable[[tuple[int, ...]], Array]
"""Returns independent standard normal numbers of a shape, others at every call."""


def seeded(*parts: int | str) -> Gaussian:
    """Return standard normal numbers that depend on nothing but the parts."""
    source = generator(*parts)

    def draw(shape: tuple[int, ...]) -> Array:
        numbers: Array = torch.randn(shape, generator=source, dtype=torch.float64).numpy()
        return numbers

    return draw


def system(shape: tuple[int, ...]) -> Array:
    """Return standard normal numbers made of the operating system's random bytes.

    A statistical generator such as Mersenne Twister or PCG64 is no protection here: its later
    numbers follow from its earlier ones. Box and Muller's transform of uniform numbers of 53 bits
    gives values up to 8.6; beyond lies a probability of 1e-17.
    """
    count = math.prod(shape)
    pairs = -(-count // 2)
    bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64) >> np.uint64(11)
    radius, angle = ((bits.astype(np.float64) + 0.5) * 2.0**-53).reshape(2, pairs)
    radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[:count].reshape(shape)


def coin(share: float, *parts: int | str, from_seed: bool) -> bool:
    """Return True with probability ``share``: by the parts, or by the operating system."""
    if not from_seed:
        return secrets.SystemRandom().random() < share
    return float(torch.rand((), generator=generator(*parts), dtype=torch.float64)) < share
