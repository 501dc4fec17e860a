"""Which clients a round asks: a seeded draw without replacement."""

from __future__ import annotations

import itertools
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
