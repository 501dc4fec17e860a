"""Clipping and Gaussian noise: of a round's mean (central privacy), or of one update (local).

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR
2018, arXiv 1710.06963, algorithm 1 with flat clipping and the fixed denominator.

Flower's strategies and mods for this are not used; ``docs/privacy.md`` says why, point by point.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.updates import clip, difference, moved
from fedl2p.method import State, Update
from fedl2p.seeds import generator

Gaussian = Callable[[tuple[int, ...]], Tensor]
"""Returns independent standard normal numbers of a shape in float64, others at every call."""


def seeded(*parts: int | str) -> Gaussian:
    """Return a source of standard normal numbers that depend on nothing but the parts."""
    source = generator(*parts)
    return lambda shape: torch.randn(shape, generator=source, dtype=torch.float64)


def system(shape: tuple[int, ...]) -> Tensor:
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
    return torch.from_numpy(both[:count].reshape(shape))


class PrivateMean:
    """The noised mean of clipped updates, as a running sum.

    Parameters
    ----------
    state
        The state that was sent.
    bound
        Largest L2 norm of an update.
    clients
        Clients expected in a round, m: the denominator, however many really answer. A client that
        is missing, or whose answer was rejected, so counts as one that wants no change.
    noise
        Noise multiplier.
    draw
        Source of the noise, for this round only.
    """

    def __init__(
        self, state: State, *, bound: float, clients: int, noise: float, draw: Gaussian
    ) -> None:
        self._state, self._bound, self._clients, self._draw = state, bound, clients, draw
        self.deviation = noise * bound / clients
        """Standard deviation of the noise in every entry of the mean."""
        self._sum = {
            name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in state.items()
        }

    def add(self, update: Update) -> None:
        """Add a checked update; its weight does not count."""
        change = difference(self._state, update.shared)
        clip(change, self._bound)
        for name, tensor in change.items():
            self._sum[name] += tensor

    def result(self) -> State:
        """Return the state moved by the noised mean; also without any update."""
        return moved(
            self._state,
            {
                name: total / self._clients + self.deviation * self._draw(tuple(total.shape))
                for name, total in self._sum.items()
            },
        )


def local_deviation(privacy: Privacy) -> float:
    """Return the standard deviation of the noise in every entry of a client's update.

    Whatever the client's data are, its clipped update lies within the bound, so two of them differ
    by twice the bound at most.
    """
    return privacy.noise * 2 * privacy.clip


def privatised(update: Update, state: State, privacy: Privacy, draw: Gaussian) -> Update:
    """Return what may leave a client under local privacy.

    The update clipped and noised, the weight 1, no metrics. What stays on the client stays as it
    is. A client that failed sends noise around the state it received, since that it failed would
    tell something of its data.

    Parameters
    ----------
    update
        What the method has made.
    state
        The state that was received.
    privacy
        The node's own settings.
    draw
        Source of noise, for this update only.
    """
    change = difference(state, state if update.failure is not None else update.shared)
    clip(change, privacy.clip)
    deviation = local_deviation(privacy)
    noised = {
        name: tensor + deviation * draw(tuple(tensor.shape)) for name, tensor in change.items()
    }
    return dataclasses.replace(
        update, shared=moved(state, noised), weight=1.0, metrics={}, failure=None
    )
