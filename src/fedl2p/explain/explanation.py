"""The numbers of one explanation, by name: profile entries, hyperparameters, attributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fedl2p.core.profiles import Profile
from fedl2p.explain.attribution import Attribution
from fedl2p.reporting.number_formats import MINUS, short_number

Bound = Literal["lower", "upper"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of the profile: a divergence in nats, or a moment of a layer's input."""

    kind: Literal["divergence", "input mean", "input sd"]
    layer: str
    value: float
    typical: float

    @property
    def name(self) -> str:
        """What it is, e.g. ``divergence of norm1``."""
        return f"{self.kind} of {self.layer}"

    @property
    def numbers(self) -> str:
        """The client's and the typical number, with as many digits as tell them apart."""
        for digits in (2, 3, 4, 5):
            value, typical = short_number(self.value, digits), short_number(self.typical, digits)
            if value != typical or self.value == self.typical:
                break
        unit = " nats" if self.kind == "divergence" else ""
        return f"{value}{unit}, typical {typical}".replace("-", MINUS)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One hyperparameter, or the mean of one kind, and its attributions.

    Parameters
    ----------
    kind, name
        mix and a norm layer, or rate and a parameter tensor.
    log
        Whether the outputs and attributions are natural logarithms of rates.
    value, typical
        Of the client and of the typical client, within the bounds.
    output, typical_output
        Of the meta-nets, before the bounds.
    attributions
        What each profile entry added to ``output - typical_output``.
    """

    kind: Literal["mix", "rate"]
    name: str
    log: bool
    value: float
    typical: float
    output: float
    typical_output: float
    attributions: Sequence[float]

    @property
    def change(self) -> float:
        """The difference that the attributions add up to."""
        return self.output - self.typical_output

    @property
    def movement(self) -> float:
        """The sum of the absolute attributions."""
        return math.fsum(map(abs, self.attributions))

    @property
    def bound(self) -> Bound | None:
        """The bound that holds the client's value, if one does."""
        return _bound(self.value, self.unbounded(self.output))

    def unbounded(self, output: float) -> float:
        """Return an output as a mix or a learning rate."""
        if not self.log:
            return output
        return math.exp(output) if output < 700 else math.inf

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return plain values; a rate beyond float64 is None."""
        outputs = map(self.unbounded, (self.output, self.typical_output))
        output, typical_output = (v if math.isfinite(v) else None for v in outputs)
        return {
            "value": self.value,
            "typical": self.typical,
            "before_bounds": output,
            "typical_before_bounds": typical_output,
            "bound": self.bound,
            "change": self.change,
            "attributions": dict(zip(names, self.attributions, strict=True)),
        }


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Everything that is said about one client.

    Parameters
    ----------
    client, pool, about
        Who it is; the pool is seen, unseen or new.
    recipe, seed
        Of the run.
    num_typical
        Number of seen clients whose median profile is the baseline.
    path
        In what the path from the baseline is straight, in words.
    entries
        The profile, in the order of all attributions.
    mixes, rates
        Every hyperparameter; a model without batch-norm has no mixes.
    gap
        How exact the attributions are, see :class:`fedl2p.explain.attribution.Attribution`.
    """

    client: str
    pool: Literal["seen", "unseen", "new"]
    about: Mapping[str, str | float]
    recipe: str
    seed: int
    num_typical: int
    path: str
    entries: Sequence[Entry]
    mixes: Sequence[Explained]
    rates: Sequence[Explained]
    gap: float

    @cached_property
    def means(self) -> tuple[Explained, ...]:
        """The mean mix, if there is one, and the mean rate."""
        return tuple(mean_of(kind) for kind in (self.mixes, self.rates) if kind)

    @cached_property
    def shares(self) -> list[float]:
        """Each entry's share of all movement, mixes and rates weighing the same.

        Movement counts absolute attributions, so that opposite ones do not cancel. The shares add
        up to 1, or are all 0 if nothing moved.
        """
        shares = [0.0] * len(self.entries)
        moving = [kind for kind in (self.mixes, self.rates) if any(one.movement for one in kind)]
        for kind in moving:
            whole = math.fsum(one.movement for one in kind)
            for i in range(len(shares)):
                pushes = math.fsum(abs(one.attributions[i]) for one in kind)
                shares[i] += pushes / whole / len(moving)
        return shares

    @cached_property
    def ranking(self) -> list[int]:
        """Positions of the entries, the largest share first."""
        shares = self.shares
        return sorted(range(len(shares)), key=lambda i: -shares[i])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values: the full matrix, by name."""
        names = [entry.name for entry in self.entries]
        return {
            "client": self.client,
            "pool": self.pool,
            "about": dict(self.about),
            "recipe": self.recipe,
            "seed": self.seed,
            "method": "integrated gradients",
            "baseline": f"median profile of {self.num_typical} seen clients",
            "path": f"straight in {self.path}",
            "rates_as": "logarithm" if self.rates[0].log else "rate",
            "gap": self.gap,
            "profile": {
                entry.name: {"value": entry.value, "typical": entry.typical, "share": share}
                for entry, share in zip(self.entries, self.shares, strict=True)
            },
            "means": {mean.kind: mean.to_dict(names) for mean in self.means},
            "mix": {mix.name: mix.to_dict(names) for mix in self.mixes},
            "rate": {rate.name: rate.to_dict(names) for rate in self.rates},
        }


def profile_entries(profile: Profile, typical: Profile) -> tuple[Entry, ...]:
    """Return the entries of a profile in the order of :class:`Attribution`'s columns."""
    sites = profile.sites
    names = [("divergence", name) for name in sites.norms]
    names += [(kind, name) for name in sites.layers for kind in ("input mean", "input sd")]
    values = [[*p.divergence.tolist(), *p.moments.flatten().tolist()] for p in (profile, typical)]
    return tuple(
        Entry(kind=kind, layer=layer, value=value, typical=other)
        for (kind, layer), value, other in zip(names, *values, strict=True)
    )


def explained(attribution: Attribution) -> tuple[list[Explained], list[Explained]]:
    """Return every mix and every rate with its attributions."""
    sites = attribution.hyperparams.sites
    ours, typical = attribution.hyperparams, attribution.typical
    names = [("mix", name) for name in sites.norms] + [("rate", name) for name in sites.params]
    columns = (
        [*ours.mix.tolist(), *ours.rate.tolist()],
        [*typical.mix.tolist(), *typical.rate.tolist()],
        attribution.outputs.tolist(),
        attribution.typical_outputs.tolist(),
        attribution.attributions.tolist(),
    )
    every = [
        Explained(
            kind=kind,
            name=name,
            log=kind == "rate" and attribution.log_rates,
            value=value,
            typical=other,
            output=output,
            typical_output=typical_output,
            attributions=attributions,
        )
        for (kind, name), value, other, output, typical_output, attributions in zip(
            names, *columns, strict=True
        )
    ]
    return every[: len(sites.norms)], every[len(sites.norms) :]


def mean_of(many: Sequence[Explained]) -> Explained:
    """Return the mean of one kind, geometric for logarithms."""
    log = many[0].log

    def within(values: list[float]) -> float:
        return math.exp(_mean([math.log(v) for v in values])) if log else _mean(values)

    return Explained(
        kind=many[0].kind,
        name="mean",
        log=log,
        value=within([one.value for one in many]),
        typical=within([one.typical for one in many]),
        output=_mean([one.output for one in many]),
        typical_output=_mean([one.typical_output for one in many]),
        attributions=[_mean(c) for c in zip(*(one.attributions for one in many), strict=True)],
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bound(value: float, output: float) -> Bound | None:
    if math.isclose(value, output, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return "upper" if output > value else "lower"
