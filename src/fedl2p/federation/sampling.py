"""Which clients a round asks: so many without replacement, or each independently."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence

import torch

from fedl2p.seeds import generator

_MOST_SHUFFLED = 100_000
"""Clients up to whom a cohort is drawn by a shuffle of all; of more, by position until enough."""


def draw_cohort(names: Sequence[str], *, size: int, seed: int, round: int) -> list[str]:
    """Draw the clients of one round, without replacement, sorted by name.

    Parameters
    ----------
    names
        The seen clients in the population's order.
    size
        How many; 0 for all.
    seed, round
        The draw depends on nothing else.
    """
    if size == 0:
        return sorted(names)
    source = generator(seed, "cohort", round)
    if len(names) <= _MOST_SHUFFLED or 2 * size > len(names):
        order = torch.randperm(len(names), generator=source)
        return sorted(names[i] for i in order[:size].tolist())
    drawn: dict[int, None] = {}
    while len(drawn) < size:  # at least half of the clients are not drawn yet
        more = torch.randint(len(names), (size,), generator=source).tolist()
        drawn |= dict.fromkeys(more)
    return sorted(names[i] for i in itertools.islice(drawn, size))


def draw_independently(
    names: Sequence[str], *, share: float, seed: int, round: int, from_seed: bool
) -> list[str]:
    """Draw each client independently (Poisson sampling), as privacy accounting supposes; sorted.

    The size of the sample varies and may be 0. The time is proportional to the registered clients.

    Parameters
    ----------
    names
        The seen clients.
    share
        Probability of each, in (0, 1].
    seed, round
        The draw depends on nothing else, if ``from_seed``; if not, the operating system draws.
    """
    random = secrets.SystemRandom()

    def drawn(name: str) -> bool:
        if not from_seed:
            return random.random() < share
        source = generator(seed, "cohort", round, name)
        return float(torch.rand((), generator=source, dtype=torch.float64)) < share

    return sorted(name for name in names if drawn(name))
