"""The settings of differential privacy; ``docs/privacy.md`` says what they promise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Mechanism = Literal["none", "central", "local"]
Randomness = Literal["auto", "seed", "system"]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Differential privacy of the rounds of one stage, at the level of whole clients.

    Parameters
    ----------
    mechanism
        none; central: the server clips every client's update and adds noise to their mean (McMahan
        et al., ICLR 2018); local: every client clips and adds noise itself, before anything leaves
        it.
    noise
        Noise multiplier, > 0: the standard deviation of the noise in units of what one client can
        change. Central: clip, in the sum over clients. Local: 2 x clip, in a client's own update.
    clip
        Largest L2 norm of a client's update, > 0.
    delta
        The delta at which epsilon is reported, in (0, 1); far below 1 / the number of clients.
    randomness
        Where noise, and under central privacy the cohorts, come from. seed: the study's seed, so
        that equal studies give equal results; whoever knows the seed can subtract the noise.
        system: the operating system, unpredictable and unrepeatable. auto: seed where all clients
        are on this machine (a simulation), system everywhere else.
    """

    mechanism: Mechanism = "none"
    noise: float = 1.0
    clip: float = 0.1
    delta: float = 1e-5
    randomness: Randomness = "auto"

    def __post_init__(self) -> None:
        for name in ("noise", "clip"):
            value = getattr(self, name)
            _need(math.isfinite(value) and value > 0, name, value, "finite and > 0")
        _need(0 < self.delta < 1, "delta", self.delta, "in (0, 1)")
        for name, kind in (("mechanism", Mechanism), ("randomness", Randomness)):
            value, known = getattr(self, name), get_args(kind)
            _need(value in known, name, value, f"one of {', '.join(known)}")

    @property
    def on(self) -> bool:
        """Whether there is any."""
        return self.mechanism != "none"

    @property
    def central(self) -> bool:
        """Whether the server adds the noise."""
        return self.mechanism == "central"

    def seeded(self, *, simulated: bool) -> bool:
        """Whether the randomness comes from the study's seed, given where the clients are."""
        return self.randomness == "seed" or (self.randomness == "auto" and simulated)


def _need(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, but must be {wanted}")
