"""What differential privacy a run has given, as ``results.json`` holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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

    def to_json(self) -> dict[str, Any]:
        """Return what ``results.json`` holds: an epsilon of infinity is null."""
        return {
            "stages": [_with_null(asdict(stage)) for stage in self.stages],
            "methods": [_with_null(asdict(method)) for method in self.methods],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PrivacySpent:
        """Read what :meth:`to_json` returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a field is missing or of a wrong type.
        """
        stages = tuple(
            StageSpent(
                stage=str(line["stage"]),
                mechanism=str(line["mechanism"]),
                randomness=str(line["randomness"]),
                noise=float(line["noise"]),
                clip=float(line["clip"]),
                cohort=int(line["cohort"]),
                population=int(line["population"]),
                releases=int(line["releases"]),
                epsilon=_number(line["epsilon"]),
                delta=float(line["delta"]),
            )
            for line in content.get("stages", ())
        )
        methods = tuple(
            MethodSpent(
                method=str(line["method"]),
                epsilon=_number(line["epsilon"]),
                delta=float(line["delta"]),
                open=tuple(map(str, line["open"])),
            )
            for line in content.get("methods", ())
        )
        return cls(stages, methods)


def epsilon_words(value: float) -> str:
    """Return an epsilon as a person writes it."""
    return f"{value:.3g}" if math.isfinite(value) else "no bound"


def _number(value: Any) -> float:
    return math.inf if value is None else float(value)


def _with_null(line: dict[str, Any]) -> dict[str, Any]:
    epsilon = line["epsilon"]
    return {**line, "epsilon": epsilon if math.isfinite(epsilon) else None}
