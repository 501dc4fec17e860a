"""What the page shows of each client: its gain, its kind, its strategy, joined by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedl2p.reporting.method_names import method_name
from fedl2p.runs import kinds
from fedl2p.runs.client_files import ClientHyperparams
from fedl2p.runs.reading import RunFolder
from fedl2p.runs.results import Pool, Row, Summary


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """One client under the method in focus.

    Gains are fractions of test examples or, where the loss has no accuracy, of the loss of the
    starting model: by how much it fell.
    """

    name: str
    pool: Pool
    kind: str
    about: Mapping[str, str | float]
    row: Row
    gain: float
    over_baseline: float | None
    strategy: ClientHyperparams | None

    @property
    def distance(self) -> float | None:
        """How far its data lie from the global model: geometric mean divergence, nats.

        Geometric, because divergences spread over orders of magnitude and one dead channel would
        decide a plain mean.
        """
        if self.strategy is None or not self.strategy.divergence:
            return None
        return kinds.geometric_mean(self.strategy.divergence.values())

    @property
    def mean_mix(self) -> float | None:
        """Plain mean over norm layers; None if it is not known or there are none."""
        if self.strategy is None:
            return None
        return kinds.mean_of(self.strategy.mix.values())

    @property
    def mean_rate(self) -> float | None:
        """Geometric mean over parameter tensors; None if it is not known."""
        return None if self.strategy is None else kinds.geometric_mean(self.strategy.rate.values())


@dataclass(frozen=True, kw_only=True)
class Group:
    """Clients of one kind, best gains on average first among the groups."""

    label: str
    clients: tuple[ClientView, ...]

    @property
    def mean_gain(self) -> float:
        """Plain mean over its clients, fraction."""
        return sum(view.gain for view in self.clients) / len(self.clients)

    @property
    def only_unseen(self) -> bool:
        """Whether no client of the kind took part in training."""
        return all(view.pool == "unseen" for view in self.clients)


def focus_of(run: RunFolder) -> str | None:
    """Return the method that the page is about: one whose strategy was learned, or None."""
    ran = {row.method for row in run.report.rows if row.failure is None}
    return next((m for m in ("fedl2p", "l2p") if m in ran), None)


def best_method(run: RunFolder) -> str:
    """Return the method that is best on unseen clients (seen, if there are none)."""
    pool = main_pool(run)
    table = [s for s in run.report.methods if s.pool == pool]
    return max(table, key=lambda s: merit(run, s)).method


def merit(run: RunFolder, summary: Summary) -> float:
    """Return what methods are ordered by: accuracy, or minus the loss where there is none."""
    value = summary.accuracy if run.report.has_accuracy else -summary.loss
    return -math.inf if math.isnan(value) else value


def gain_unit(run: RunFolder) -> str:
    """Return what gains are written in."""
    return "points of accuracy" if run.report.has_accuracy else "percent of the starting loss"


def main_pool(run: RunFolder) -> Pool:
    """Return the pool that the headline is about."""
    return "unseen" if any(s.pool == "unseen" for s in run.report.methods) else "seen"


def kind_key(run: RunFolder) -> str | None:
    """Return the first key of ``about`` that holds text, if its values can group the clients."""
    return kinds.kind_key(run.about)


def client_views(run: RunFolder, method: str, *, baseline: str | None) -> tuple[ClientView, ...]:
    """Join the files by client, for the clients on which ``method`` has a tested result.

    Parameters
    ----------
    method
        The method whose gains are shown.
    baseline
        The method that ``over_baseline`` subtracts, or None.
    """
    by_accuracy = run.report.has_accuracy
    tested = [row for row in run.report.rows if _tested(row, by_accuracy)]
    others = {row.client: row for row in tested if row.method == baseline}
    rows = [row for row in tested if row.method == method]
    groups = kinds.kinds_of(run.about, [row.client for row in rows])
    strategies = run.strategies.get(method, {})
    return tuple(
        ClientView(
            name=row.client,
            pool=row.pool,
            kind=groups[row.client] if groups else f"{row.pool} clients",
            about=run.about[row.client],
            row=row,
            gain=row.accuracy - row.accuracy_before if by_accuracy else 1 - _loss_left(row, row),
            over_baseline=_over(row, others.get(row.client), by_accuracy),
            strategy=strategies.get(row.client),
        )
        for row in rows
    )


def group_views(views: Sequence[ClientView]) -> tuple[Group, ...]:
    """Group by kind, the largest mean gain first; within a kind seen before unseen, far to near."""
    by_kind: dict[str, list[ClientView]] = {}
    for view in views:
        by_kind.setdefault(view.kind, []).append(view)
    groups = [
        Group(
            label=kind,
            clients=tuple(
                sorted(members, key=lambda v: (v.pool == "unseen", -(v.distance or 0.0), v.name))
            ),
        )
        for kind, members in by_kind.items()
    ]
    return tuple(sorted(groups, key=lambda group: (-group.mean_gain, group.label)))


def describe_about(about: Mapping[str, str | float]) -> str:
    """Return what is known of a client, e.g. ``sensor blur, severity 0.7``."""
    return ", ".join(
        f"{key.replace('_', ' ')} {f'{value:.2g}' if isinstance(value, float) else value}"
        for key, value in about.items()
    )


def baseline_of(run: RunFolder, method: str) -> str | None:
    """Return the method that per-client results are set against: today's usual strategy."""
    ran = {row.method for row in run.report.rows if row.failure is None}
    usual = ("finetuning-client", "finetuning-global", "bestfixed", "fedavg")
    return next((m for m in usual if m in ran and m != method), None)


def label(method: str) -> str:
    """Return a method's name in tables."""
    return method_name(method).label


def _tested(row: Row, by_accuracy: bool) -> bool:
    if row.failure is not None or row.num_test == 0:
        return False
    return by_accuracy or (math.isfinite(row.loss) and 0 < row.loss_before < math.inf)


def _loss_left(row: Row, start: Row) -> float:
    """Return a loss as a fraction of that of the starting model."""
    return row.loss / start.loss_before


def _over(row: Row, other: Row | None, by_accuracy: bool) -> float | None:
    if other is None:
        return None
    if by_accuracy:
        return row.accuracy - other.accuracy
    return _loss_left(other, row) - _loss_left(row, row)
