"""Cohorts drawn client by client, for rounds under central privacy."""

from __future__ import annotations

from collections.abc import Sequence

from fedl2p.federation.privacy.randomness import coin


def draw_each(
    names: Sequence[str], *, share: float, seed: int, round: int, from_seed: bool
) -> list[str]:
    """Draw every client for itself (Poisson sampling), as privacy accounting supposes.

    The cohort's size varies and may be 0. Everybody's coin is tossed in every round, so that this
    takes time in proportion to the registered clients, though no memory.

    Parameters
    ----------
    names
        The seen clients.
    share
        Probability of each, in (0, 1].
    seed, round
        The draw depends on nothing else, if ``from_seed``; if not, the operating system draws.
    """
    return sorted(
        name for name in names if coin(share, seed, "cohort", round, name, from_seed=from_seed)
    )
