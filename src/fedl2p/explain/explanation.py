"""One client's explanation: who it is, the attributions, and what they sum up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fedl2p.explain.attribution import Attribution, Explained


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
        Number of seen clients whose median profile is the typical one.
    attribution
        What moved its hyperparameters.
    """

    client: str
    pool: Literal["seen", "unseen", "new"]
    about: Mapping[str, str | float]
    recipe: str
    seed: int
    num_typical: int
    attribution: Attribution

    @property
    def kinds(self) -> list[Sequence[Explained]]:
        """Mixes, if the model has batch-norm, and rates."""
        return [kind for kind in (self.attribution.mixes, self.attribution.rates) if kind]

    @cached_property
    def means(self) -> list[Explained]:
        """The mean mix, if there is one, and the mean rate."""
        return [mean_of(kind) for kind in self.kinds]

    @cached_property
    def shares(self) -> list[float]:
        """Each entry's share of all movement, mixes and rates weighing the same.

        Movement counts absolute attributions, so that opposite ones do not cancel. The shares add
        up to 1, or are all 0 if nothing moved.
        """
        shares = [0.0] * len(self.attribution.entries)
        moving = [kind for kind in self.kinds if any(one.movement for one in kind)]
        for kind in moving:
            whole = math.fsum(one.movement for one in kind)
            for i in range(len(shares)):
                pushes = math.fsum(abs(one.attributions[i]) for one in kind)
                shares[i] += pushes / whole / len(moving)
        return shares

    @cached_property
    def ranking(self) -> list[int]:
        """Positions of the entries, the largest share first."""
        return sorted(range(len(self.shares)), key=lambda i: -self.shares[i])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values: the full matrix, by name."""
        found = self.attribution
        return {
            "client": self.client,
            "pool": self.pool,
            "about": dict(self.about),
            "recipe": self.recipe,
            "seed": self.seed,
            "method": "integrated gradients",
            "baseline": f"median profile of {self.num_typical} seen clients",
            "rates_as": "logarithm" if found.rates[0].log else "rate",
            "gap": found.gap,
            "profile": {
                entry.name: {"value": entry.value, "typical": entry.typical, "share": share}
                for entry, share in zip(found.entries, self.shares, strict=True)
            },
            "means": {mean.kind: self._plain(mean) for mean in self.means},
            "mix": {mix.name: self._plain(mix) for mix in found.mixes},
            "rate": {rate.name: self._plain(rate) for rate in found.rates},
        }

    def _plain(self, one: Explained) -> dict[str, Any]:
        outputs = map(one.unbounded, (one.output, one.typical_output))
        output, typical_output = (v if math.isfinite(v) else None for v in outputs)
        names = (entry.name for entry in self.attribution.entries)
        return {
            "value": one.value,
            "typical": one.typical,
            "before_bounds": output,
            "typical_before_bounds": typical_output,
            "change": one.change,
            "attributions": dict(zip(names, one.attributions, strict=True)),
        }


def mean_of(many: Sequence[Explained]) -> Explained:
    """Return the mean of one kind, geometric for logarithms."""
    log = many[0].log
    forth, back = (math.log, math.exp) if log else (float, float)
    return Explained(
        kind=many[0].kind,
        name="mean",
        log=log,
        value=back(_mean([forth(one.value) for one in many])),
        typical=back(_mean([forth(one.typical) for one in many])),
        output=_mean([one.output for one in many]),
        typical_output=_mean([one.typical_output for one in many]),
        attributions=[_mean(c) for c in zip(*(one.attributions for one in many), strict=True)],
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
