"""What the page shows of each client: its gain, its kind, its strategy, joined by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedl2p.reporting.method_names import method_name
from fedl2p.runs.client_files import ClientHyperparams
from fedl2p.runs.reading import RunFolder
from fedl2p.runs.results import Pool, Row

MOST_KINDS = 16
"""More groups than this cannot be told apart in a figure; the rarest are put together."""
OTHERS = "other kinds"


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """One client under the method in focus. Gains are fractions of test examples."""

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
        return _geometric_mean(self.strategy.divergence.values())

    @property
    def mean_mix(self) -> float | None:
        """Plain mean over norm layers; None if it is not known or there are none."""
        if self.strategy is None:
            return None
        values = _finite(self.strategy.mix.values())
        return sum(values) / len(values) if values else None

    @property
    def mean_rate(self) -> float | None:
        """Geometric mean over parameter tensors; None if it is not known."""
        return None if self.strategy is None else _geometric_mean(self.strategy.rate.values())


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
    """Return the method with the highest accuracy on unseen clients (seen, if there are none)."""
    pool = main_pool(run)
    table = [s for s in run.report.methods if s.pool == pool]
    return max(table, key=lambda s: -1.0 if math.isnan(s.accuracy) else s.accuracy).method


def main_pool(run: RunFolder) -> Pool:
    """Return the pool that the headline is about."""
    return "unseen" if any(s.pool == "unseen" for s in run.report.methods) else "seen"


def kind_key(run: RunFolder) -> str | None:
    """Return the first key of ``about`` that holds text, if its values can group the clients."""
    for known in run.about.values():
        for key, value in known.items():
            if isinstance(value, str):
                kinds = {about.get(key) for about in run.about.values()}
                names_everyone = len(kinds) > max(MOST_KINDS, len(run.about) / 2)
                return None if names_everyone else key
    return None


def client_views(run: RunFolder, method: str, *, baseline: str | None) -> tuple[ClientView, ...]:
    """Join the files by client, for the clients on which ``method`` has a tested result.

    Parameters
    ----------
    method
        The method whose gains are shown.
    baseline
        The method that ``over_baseline`` subtracts, or None.
    """
    others = {r.client: r.accuracy for r in run.report.rows if r.method == baseline and _tested(r)}
    rows = [r for r in run.report.rows if r.method == method and _tested(r)]
    kinds = _kinds(run, rows)
    strategies = run.strategies.get(method, {})
    return tuple(
        ClientView(
            name=row.client,
            pool=row.pool,
            kind=kinds[row.client],
            about=run.about[row.client],
            row=row,
            gain=row.accuracy - row.accuracy_before,
            over_baseline=row.accuracy - others[row.client] if row.client in others else None,
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


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the positive finite values; None if there are none."""
    logs = [math.log(value) for value in _finite(values) if value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _tested(row: Row) -> bool:
    return row.failure is None and row.num_test > 0


def _kinds(run: RunFolder, rows: Sequence[Row]) -> dict[str, str]:
    key = kind_key(run)
    if key is None:
        return {row.client: f"{row.pool} clients" for row in rows}
    kinds = {row.client: str(run.about[row.client].get(key, "unknown")) for row in rows}
    counts = Counter(kinds.values())
    if len(counts) <= MOST_KINDS:
        return kinds
    kept = {kind for kind, _ in counts.most_common(MOST_KINDS - 1)}
    return {client: kind if kind in kept else OTHERS for client, kind in kinds.items()}
