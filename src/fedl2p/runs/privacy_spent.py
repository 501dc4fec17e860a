"""What differential privacy a run has given, as ``results.json`` holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageSpent:
    """One stage of rounds.

    Parameters
    ----------
    stage, mechanism
        Which, and how: central, adaptive or local.
    randomness
        seed: from the study's seed, so a simulation; system: from the operating system.
    noise, clip
        Noise multiplier, and the bound on the norm of an update (adaptive: of the first round).
    cohort, population
        Clients expected in a round, of so many.
    releases
        Noised results: rounds, or under local privacy the updates of the client asked most.
    epsilon, delta
        Of this stage alone; infinity for no bound.
    """

    stage: str
    mechanism: str
    randomness: str
    noise: float
    clip: float
    cohort: int
    population: int
    releases: int
    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class MethodSpent:
    """All that was learned for one method, from pre-training on.

    Parameters
    ----------
    method
        Its name.
    epsilon, delta
        Of all its stages together; infinity for no bound.
    open
        Why there is none: the stages without privacy, or other reasons.
    """

    method: str
    epsilon: float
    delta: float
    open: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrivacySpent:
    """Stages that had privacy, and every method of the run; both empty if none had any."""

    stages: tuple[StageSpent, ...] = ()
    methods: tuple[MethodSpent, ...] = ()


def epsilon_words(value: float) -> str:
    """Return an epsilon as a person writes it."""
    return f"{value:.3g}" if math.isfinite(value) else "no bound"
