"""Why one client got its hyperparameters: the numbers of one explanation, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fedl2p.core.profiles import Profile
from fedl2p.explain.attribution import Attribution
from fedl2p.reporting.number_formats import MINUS, short_number
from fedl2p.reporting.svg import shorten

Kind = Literal["mix", "rate"]

_ENTRY_WORDS = {"divergence": "divergence", "mean": "input mean", "sd": "input sd"}
_SHORT_WORDS = {"divergence": "div.", "mean": "mean", "sd": "sd"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of the profile: a divergence in nats, or a moment of a layer's input."""

    kind: Literal["divergence", "mean", "sd"]
    layer: str
    value: float
    typical: float

    @property
    def name(self) -> str:
        """Return what it is, e.g. ``divergence of norm1``."""
        return f"{_ENTRY_WORDS[self.kind]} of {self.layer}"

    def short(self, length: int) -> str:
        """Return the name in at most ``length`` letters; of a long layer name both ends stay."""
        if len(self.name) <= length:
            return self.name
        kind = _SHORT_WORDS[self.kind]
        return f"{kind} {shorten(self.layer, length - len(kind) - 1)}"

    @property
    def unit(self) -> str:
        """Return its unit with a space before it; moments have none."""
        return " nats" if self.kind == "divergence" else ""

    @property
    def numbers(self) -> tuple[str, str]:
        """Return the client's and the typical number with as many digits as tell them apart."""
        for digits in (2, 3, 4, 5):
            value, typical = short_number(self.value, digits), short_number(self.typical, digits)
            if value != typical or self.value == self.typical:
                break
        return value.replace("-", MINUS), typical.replace("-", MINUS)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One hyperparameter, or the mean of one kind, and what moved it.

    Parameters
    ----------
    kind, name
        mix and a norm layer, or rate and a parameter tensor.
    log
        Whether ``before``, ``typical_before`` and ``parts`` are natural logarithms of rates.
    value, typical
        The client's and the typical client's, within the bounds.
    before, typical_before
        The same before the bounds.
    parts
        What each profile entry added to ``before - typical_before``.
    """

    kind: Kind
    name: str
    log: bool
    value: float
    typical: float
    before: float
    typical_before: float
    parts: tuple[float, ...]

    @property
    def change(self) -> float:
        """Return the difference that the parts add up to."""
        return self.before - self.typical_before

    @property
    def movement(self) -> float:
        """Return the sum of the absolute parts: how much it was pushed, whatever the direction."""
        return math.fsum(map(abs, self.parts))

    @property
    def written(self) -> float:
        """Return what the nets wrote for the client before the bounds, in the value's unit."""
        return _exp(self.before) if self.log else self.before

    @property
    def typical_written(self) -> float:
        """Return the same for the typical client."""
        return _exp(self.typical_before) if self.log else self.typical_before

    @property
    def bound(self) -> Literal["lower", "upper"] | None:
        """Return the bound that holds the client's value, if one does."""
        return _bound(self.value, self.written)

    @property
    def typical_bound(self) -> Literal["lower", "upper"] | None:
        """Return the bound that holds the typical client's value, if one does."""
        return _bound(self.typical, self.typical_written)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Everything that is said about one client.

    Parameters
    ----------
    client, pool, about
        Who it is; the pool is seen, unseen or new.
    recipe, seed
        Of the run.
    compared
        How many seen clients the typical profile is the median of.
    reads
        In what the path between the two profiles is straight, in words.
    entries
        The profile, in the order of every ``parts``.
    mixes, rates
        Every hyperparameter; a model without batch-norm has no mixes.
    mean_mix, mean_rate
        The plain mean of the mixes (None without any), and the mean of the rates: geometric where
        they are explained as logarithms.
    points, gap, tolerance
        How exact the parts are: how far they fail to add up, as a fraction of all movement of one
        hyperparameter, and how far that was wanted at most.
    """

    client: str
    pool: Literal["seen", "unseen", "new"]
    about: Mapping[str, str | float]
    recipe: str
    seed: int
    compared: int
    reads: str
    entries: tuple[Entry, ...]
    mixes: tuple[Moved, ...]
    rates: tuple[Moved, ...]
    mean_mix: Moved | None
    mean_rate: Moved
    points: int
    gap: float
    tolerance: float

    @property
    def converged(self) -> bool:
        """Tell whether the parts add up as well as was wanted."""
        return self.gap <= self.tolerance

    @property
    def means(self) -> tuple[Moved, ...]:
        """Return the means that there are."""
        return (self.mean_rate,) if self.mean_mix is None else (self.mean_mix, self.mean_rate)

    @property
    def shares(self) -> tuple[float, ...]:
        """Return each entry's share of all movement, mixes and rates weighing the same.

        Movement is the sum of absolute parts, so that pushes in opposite directions do not cancel.
        The shares add up to 1, or are all 0 if nothing moved.
        """
        kinds = [
            [math.fsum(abs(m.parts[i]) for m in moved) for i in range(len(self.entries))]
            for moved in (self.mixes, self.rates)
        ]
        moving = [(pushes, math.fsum(pushes)) for pushes in kinds if math.fsum(pushes) > 0]
        return tuple(
            math.fsum(pushes[i] / whole for pushes, whole in moving) / max(1, len(moving))
            for i in range(len(self.entries))
        )

    @property
    def ranking(self) -> list[int]:
        """Return the positions of the entries, the largest share first."""
        shares = self.shares
        return sorted(range(len(self.entries)), key=lambda i: -shares[i])

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values: the full matrix, by name."""
        names = [entry.name for entry in self.entries]
        return {
            "client": self.client,
            "pool": self.pool,
            "about": dict(self.about),
            "recipe": self.recipe,
            "seed": self.seed,
            "method": "integrated gradients",
            "baseline": f"median profile of {self.compared} seen clients",
            "path": f"straight in {self.reads}",
            "rates_as": "logarithm" if self.mean_rate.log else "rate",
            "points": self.points,
            "gap": self.gap,
            "converged": self.converged,
            "profile": {
                entry.name: {
                    "kind": entry.kind,
                    "layer": entry.layer,
                    "value": entry.value,
                    "typical": entry.typical,
                    "share": share,
                }
                for entry, share in zip(self.entries, self.shares, strict=True)
            },
            "means": {moved.kind: _plain(moved, names) for moved in self.means},
            "mix": {moved.name: _plain(moved, names) for moved in self.mixes},
            "rate": {moved.name: _plain(moved, names) for moved in self.rates},
        }


def entries_of(profile: Profile, typical: Profile) -> tuple[Entry, ...]:
    """Return the entries of a profile in the order of :class:`Attribution`'s parts."""
    sites = profile.sites
    nats = [profile.divergence.tolist(), typical.divergence.tolist()]
    moments = [profile.moments.tolist(), typical.moments.tolist()]
    divergences = [
        Entry(kind="divergence", layer=name, value=here, typical=there)
        for name, here, there in zip(sites.norms, *nats, strict=True)
    ]
    inputs = [
        entry
        for name, here, there in zip(sites.layers, *moments, strict=True)
        for entry in (
            Entry(kind="mean", layer=name, value=here[0], typical=there[0]),
            Entry(kind="sd", layer=name, value=here[1], typical=there[1]),
        )
    ]
    return (*divergences, *inputs)


def moved_of(found: Attribution) -> tuple[tuple[Moved, ...], tuple[Moved, ...]]:
    """Return every mix and every rate with its parts."""
    here, there, sites = found.hyperparams, found.typical, found.hyperparams.sites
    mixes = (here.mix, there.mix, found.mix, found.typical_mix, found.mix_parts)
    rates = (here.rate, there.rate, found.rate, found.typical_rate, found.rate_parts)
    return (
        _moved("mix", sites.norms, mixes, log=False),
        _moved("rate", sites.params, rates, log=found.scale == "log"),
    )


def _moved(
    kind: Kind, names: Sequence[str], columns: Sequence[Tensor], *, log: bool
) -> tuple[Moved, ...]:
    numbers: list[list[Any]] = [column.tolist() for column in columns]
    return tuple(
        Moved(
            kind=kind,
            name=name,
            log=log,
            value=value,
            typical=typical,
            before=before,
            typical_before=typical_before,
            parts=tuple(parts),
        )
        for name, value, typical, before, typical_before, parts in zip(names, *numbers, strict=True)
    )


def mean_of(many: Sequence[Moved]) -> Moved | None:
    """Return the mean of one kind, geometric for logarithms; None of none."""
    if not many:
        return None
    log = many[0].log

    def within(values: list[float]) -> float:
        return _exp(_mean([math.log(v) for v in values])) if log else _mean(values)

    return Moved(
        kind=many[0].kind,
        name="mean",
        log=log,
        value=within([m.value for m in many]),
        typical=within([m.typical for m in many]),
        before=_mean([m.before for m in many]),
        typical_before=_mean([m.typical_before for m in many]),
        parts=tuple(map(_mean, zip(*(m.parts for m in many), strict=True))),
    )


def _plain(moved: Moved, names: Sequence[str]) -> dict[str, Any]:
    return {
        "value": moved.value,
        "typical": moved.typical,
        "before_bounds": _finite(moved.written),
        "typical_before_bounds": _finite(moved.typical_written),
        "bound": moved.bound,
        "typical_bound": moved.typical_bound,
        "change": moved.change,
        "parts": dict(zip(names, moved.parts, strict=True)),
    }


def _finite(value: float) -> float | None:
    # JSON has no infinity; a logarithm that large has no rate in float64.
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _bound(value: float, written: float) -> Literal["lower", "upper"] | None:
    if math.isclose(value, written, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return "upper" if written > value else "lower"
