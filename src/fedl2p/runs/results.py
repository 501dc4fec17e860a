"""The result of a run: one row per method and client, and the table that sums them up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedl2p.method import Scores
from fedl2p.methods import PRETRAINING
from fedl2p.runs import layout
from fedl2p.runs.client_names import check_name
from fedl2p.runs.columns import ACCURACIES, CLIENT_COLUMNS, SCORES, names_of, to_csv, values_of
from fedl2p.runs.files import (
    damaged,
    read_json,
    read_table,
    with_number,
    without_infinities,
    write_atomically,
)
from fedl2p.runs.privacy_spent import PrivacySpent, epsilon_words
from fedl2p.runs.validation import from_plain
from fedl2p.text_table import columns, html_table, short_repr

if TYPE_CHECKING:
    from fedl2p.method import Outcome

Pool = Literal["seen", "unseen"]
POOLS: tuple[Pool, ...] = ("seen", "unseen")
"""Clients that took part in training, and clients that did not."""


@dataclass(frozen=True, kw_only=True)
class Row(Scores):
    """One client under one method, on its own test part.

    A client without test examples has NaN accuracies and losses and counts in no mean. Where the
    loss has no accuracy, accuracies are NaN.

    Parameters
    ----------
    method, client
        Names.
    pool
        ``"seen"`` if the client took part in training, else ``"unseen"``.
    failure
        None, or one line that says why this client has no result; then the other numbers are void.
    """

    method: str
    client: str
    pool: Pool
    failure: str | None = None

    def __post_init__(self) -> None:
        check_name(self.client)
        if not self.method.isprintable():  # results of others are shown on a terminal
            raise ValueError(f"the method's name {self.method[:30]!a} is not printable")
        where = f"client {self.client!r} of method {self.method!r}"
        if self.pool not in POOLS:
            raise ValueError(f"{where} is in pool {self.pool!r}; a pool is 'seen' or 'unseen'")
        if self.num_train < 0 or self.num_test < 0:
            raise ValueError(f"{where} has a negative number of examples; give counts >= 0")
        if self.failure is None:
            accuracies = {name: getattr(self, name) for name in ACCURACIES}
            if all(map(math.isnan, accuracies.values())):  # not tested, or a loss without accuracy
                return
            for name, value in accuracies.items():
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"{where} has {name} {value}; give a fraction in [0, 1]")

    @classmethod
    def of(cls, method: str, pool: Pool, outcome: Outcome) -> Row:
        """Take the numbers of an outcome; its hyperparameters and profile stay where they are."""
        scores = {name: getattr(outcome, name) for name in SCORES}
        return cls(
            method=method, client=outcome.client, pool=pool, failure=outcome.failure, **scores
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One method on one pool of clients, failed clients left out.

    Parameters
    ----------
    method, pool
        As in :class:`Row`.
    clients
        Number of clients with a result.
    accuracy_before, accuracy, loss
        Means over clients weighted by their test examples, as published; fractions and nats.
    accuracy_worst_decile
        Plain mean accuracy of the worst tenth of clients, rounded up, so of one at least. Every
        client counts the same there, because it is about clients, not examples.
    share_worse
        Share of the tested clients that are worse with this method than with the starting model,
        see :func:`made_worse`; every client counts the same.
    seconds_per_client
        Plain mean over clients.
    """

    method: str
    pool: Pool
    clients: int
    accuracy_before: float
    accuracy: float
    accuracy_worst_decile: float
    share_worse: float
    loss: float
    seconds_per_client: float


@dataclass(frozen=True, kw_only=True)
class KindSummary(Summary):
    """One method on the clients of one kind in one pool.

    Parameters
    ----------
    kind
        What these clients have in common, e.g. a sensor or a domain.
    mix, rate
        What they were fine-tuned with, where it is known: mean mix over norm layers and clients,
        geometric mean of the learning rates over parameter tensors and clients; else NaN.
    """

    kind: str
    mix: float
    rate: float


WORST_DECILE = "accuracy_worst_decile"
"""The field of a summary that comparisons over seeds report too."""


SHARE_WORSE = "share_worse"
"""Another one."""

TOLERANCE = 0.005
"""Half a point of accuracy, or half a percent of a loss: a smaller fall is none."""


def made_worse(row: Row, start: float) -> bool:
    """Tell whether a client lost by a method.

    Its test accuracy lies below that of the starting model by more than one test example and by
    more than half a point (:data:`TOLERANCE`). Where the loss has no accuracy: its test loss lies
    above that before personalization by more than half a percent.

    Parameters
    ----------
    row
        The client under the method, with test examples.
    start
        The client's accuracy under the starting model: the global model without fine-tuning, which
        is the method ``fedavg``. Where that did not run, the client's own accuracy before
        personalization, which is the same for methods that fine-tune the global model.
    """
    if math.isnan(start) or math.isnan(row.accuracy):
        return not row.loss <= row.loss_before + TOLERANCE * abs(row.loss_before)
    least = max(1.0, TOLERANCE * row.num_test)
    return (start - row.accuracy) * row.num_test > least + 1e-6  # fractions are rounded


def summarise(rows: Iterable[Row]) -> tuple[Summary, ...]:
    """Sum up rows per method, in order of first appearance, and pool, seen before unseen."""
    groups: dict[tuple[str, Pool], list[Row]] = {}
    rows = list(rows)
    starts = starting_accuracies(rows)
    for method in dict.fromkeys(row.method for row in rows):
        for pool in POOLS:
            group = [r for r in rows if (r.method, r.pool, r.failure) == (method, pool, None)]
            if group:
                groups[method, pool] = group
    return tuple(_summary(method, pool, group, starts) for (method, pool), group in groups.items())


def starting_accuracies(rows: Iterable[Row]) -> dict[str, float]:
    """Return the accuracies of the global model without fine-tuning by client, where it ran."""
    return {
        row.client: row.accuracy
        for row in rows
        if row.method == PRETRAINING and row.failure is None and row.num_test > 0
    }


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a report says of its run as a whole.

    Parameters
    ----------
    recipe, seed, engine, device
        What ran, and where.
    versions
        Package name to version.
    seconds
        Wall-clock seconds by stage: ``pretrain``, ``learn``, ``personalize``, ``total``.
    bytes_per_client_round
        Stage to ``{"down": bytes, "up": bytes}``, for one client in one round: what every round
        costs. The global model, sent to each client once, is not part of it.
    bytes_model
        Bytes of the global model, for one client; 0 if not known.
    privacy
        What differential privacy its stages gave.
    """

    recipe: str
    seed: int
    engine: str
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes_per_client_round: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bytes_model: int = 0
    privacy: PrivacySpent = field(default_factory=PrivacySpent)


@dataclass(frozen=True, kw_only=True)
class FailedClient:
    """A client without a result, as results.json names it."""

    method: str
    client: str
    pool: Pool
    num_train: int
    num_test: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ResultsFile(RunInfo):
    """The content of results.json.

    Parameters
    ----------
    methods
        One summary per method and pool.
    kinds
        The same per kind of client; empty where clients have no kinds.
    failures
        Clients without a result.
    """

    methods: tuple[Summary, ...]
    kinds: tuple[KindSummary, ...]
    failures: tuple[FailedClient, ...]


@dataclass(frozen=True, kw_only=True)
class Report(RunInfo):
    """Everything that a run found out.

    Parameters
    ----------
    rows
        One per method and client.
    kinds
        Their summaries per kind of client, see :func:`fedl2p.runs.kinds.summarise_kinds`.
    """

    rows: tuple[Row, ...]
    kinds: tuple[KindSummary, ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for row in self.rows:
            if (row.method, row.client) in seen:
                raise ValueError(
                    f"client {row.client!r} has two rows for method {row.method!r}; give one"
                )
            seen.add((row.method, row.client))

    @cached_property
    def methods(self) -> tuple[Summary, ...]:
        """The table: one summary per method and pool."""
        return summarise(self.rows)

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:
        yield "recipe", self.recipe
        yield "seed", self.seed
        yield "methods", list(dict.fromkeys(row.method for row in self.rows))
        yield "clients", len({row.client for row in self.rows})

    def __repr__(self) -> str:
        return short_repr(self)

    def _repr_html_(self) -> str:
        tables = [[s for s in self.methods if s.pool == pool] for pool in POOLS]
        return "".join(
            html_table(_text_rows(table), caption=f"{table[0].pool} clients")
            for table in tables
            if table
        )

    def __str__(self) -> str:
        """Return the table for a terminal, in percent, one block per pool of clients."""
        blocks = [f"{self.recipe}, seed {self.seed}"]
        for pool in POOLS:
            table = [summary for summary in self.methods if summary.pool == pool]
            if table:
                blocks.append("\n".join([f"{pool} clients", *columns(_text_rows(table), gap=2)]))
        if self.failures:
            names = ", ".join(dict.fromkeys(row.client for row in self.failures))
            blocks.append(f"without a result: {names} (reasons in {layout.RESULTS})")
        if self.privacy.methods:
            spent = [f"{m.method} {epsilon_words(m.epsilon)}" for m in self.privacy.methods]
            delta = self.privacy.methods[0].delta
            blocks.append(f"privacy, epsilon at delta {delta:g}: {', '.join(spent)}")
        return "\n\n".join(blocks)

    @property
    def has_accuracy(self) -> bool:
        """Whether methods are compared by accuracy; if not, by loss, since theirs has none."""
        finite = [math.isfinite(summary.accuracy) for summary in self.methods]
        return any(finite) or not any(math.isfinite(summary.loss) for summary in self.methods)

    @property
    def failures(self) -> tuple[Row, ...]:
        """Rows of clients that have no result."""
        return tuple(row for row in self.rows if row.failure is not None)

    def save(self, folder: str | Path) -> None:
        """Write ``results.json`` and ``clients.csv`` into an existing folder, each atomically.

        The same report gives the same bytes. A failed client has no line in ``clients.csv``; it is
        under ``failures`` in ``results.json`` with its reason. A number that is not finite is null
        in ``results.json``.

        Raises
        ------
        ValueError
            If the folder does not exist.
        """
        folder = Path(folder)
        results = [row for row in self.rows if row.failure is None]
        lines = [CLIENT_COLUMNS, *(values_of(row, CLIENT_COLUMNS) for row in results)]
        write_atomically(folder / layout.CLIENTS, to_csv(lines))
        info = {name: getattr(self, name) for name in names_of(RunInfo)}
        content = ResultsFile(
            **info,
            methods=self.methods,
            kinds=self.kinds,
            failures=tuple(_failed_client(row) for row in self.failures),
        )
        plain = without_infinities(asdict(content))
        text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / layout.RESULTS, text)

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If a file is missing or damaged, or if the two files are not of the same run.
        """
        folder = Path(folder)
        stored = _read_results(folder / layout.RESULTS)
        rows = read_table(folder / layout.CLIENTS, Row, CLIENT_COLUMNS)
        try:
            report = cls(
                **{name: getattr(stored, name) for name in names_of(RunInfo)},
                rows=(*rows, *map(_failed_row, stored.failures)),
                kinds=stored.kinds,
            )
        except ValueError as error:
            raise damaged(folder / layout.CLIENTS, str(error)) from None
        _check_same_run(folder / layout.RESULTS, stored.methods, report.methods)
        return report


def _failed_client(row: Row) -> FailedClient:
    shared = {name: getattr(row, name) for name in names_of(FailedClient) if name != "reason"}
    return FailedClient(reason=row.failure or "", **shared)


def _failed_row(failed: FailedClient) -> Row:
    void = dict.fromkeys(SCORES, math.nan)
    values = {**void, **asdict(failed), "failure": failed.reason}
    del values["reason"]
    return Row(**values)


def _read_results(path: Path) -> ResultsFile:
    content = read_json(path)
    if (text := _unprintable(content)) is not None:
        raise damaged(path, f"it holds the text {text[:30]!a}, which a terminal would obey")
    privacy = {"privacy": with_number(math.inf, content["privacy"])} if "privacy" in content else {}
    try:
        return from_plain(ResultsFile, {**with_number(math.nan, content), **privacy})
    except ValueError as error:
        raise damaged(path, str(error)) from None


def _unprintable(value: object) -> str | None:
    """Return the first text in JSON values that is not one printable line, or None."""
    if isinstance(value, str):
        return None if value.isprintable() else value
    items = [*value, *value.values()] if isinstance(value, dict) else value
    found = map(_unprintable, items) if isinstance(items, list) else iter(())
    return next((text for text in found if text is not None), None)


def _summary(method: str, pool: Pool, rows: Sequence[Row], starts: Mapping[str, float]) -> Summary:
    judged = [row for row in rows if row.num_test > 0]
    worst = sorted(row.accuracy for row in judged)[: math.ceil(len(judged) / 10)]
    return Summary(
        method=method,
        pool=pool,
        clients=len(rows),
        accuracy_before=_weighted(judged, lambda row: row.accuracy_before),
        accuracy=_weighted(judged, lambda row: row.accuracy),
        accuracy_worst_decile=math.fsum(worst) / len(worst) if worst else math.nan,
        share_worse=share_worse(judged, starts),
        loss=_weighted(judged, lambda row: row.loss),
        seconds_per_client=math.fsum(row.seconds for row in rows) / len(rows),
    )


def share_worse(rows: Sequence[Row], starts: Mapping[str, float]) -> float:
    """Return the share of tested clients that a method made worse; NaN without any."""
    worse = [made_worse(row, starts.get(row.client, row.accuracy_before)) for row in rows]
    return sum(worse) / len(worse) if worse else math.nan


def _text_rows(table: Sequence[Summary]) -> Sequence[tuple[str, ...]]:
    scores = ("before\n%", "after\n%", "worst\ntenth %", "made\nworse %", "loss")
    heads = ("method", *scores, "s per\nclient", "clients")
    if all(math.isnan(summary.accuracy) for summary in table):
        return [("method", "made\nworse %", "loss", "s per\nclient", "clients")] + [
            (
                summary.method,
                f"{100 * summary.share_worse:.0f}",
                f"{summary.loss:.4g}",
                f"{summary.seconds_per_client:.3g}",
                str(summary.clients),
            )
            for summary in table
        ]
    return [heads] + [
        (
            summary.method,
            f"{100 * summary.accuracy_before:.2f}",
            f"{100 * summary.accuracy:.2f}",
            f"{100 * summary.accuracy_worst_decile:.2f}",
            f"{100 * summary.share_worse:.0f}",
            f"{summary.loss:.3f}",
            f"{summary.seconds_per_client:.3g}",
            str(summary.clients),
        )
        for summary in table
    ]


def _weighted(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    total = sum(row.num_test for row in rows)
    # Not fsum: it refuses to add infinities of both signs, and a diverged client may have one.
    return sum(row.num_test * value(row) for row in rows) / total if total else math.nan


def _check_same_run(path: Path, stored: Sequence[Summary], computed: Sequence[Summary]) -> None:
    before = {(summary.method, summary.pool): summary for summary in stored}
    after = {(summary.method, summary.pool): summary for summary in computed}
    for key in dict.fromkeys([*before, *after]):
        if key not in before or key not in after:
            where = layout.CLIENTS if key in after else layout.RESULTS
            raise damaged(path, f"{key[0]} on {key[1]} clients is in {where} only")
        old, new = before[key], after[key]
        same = math.isnan(old.accuracy) or math.isclose(old.accuracy, new.accuracy, abs_tol=1e-9)
        if old.clients != new.clients or not same:
            raise damaged(
                path, f"{key[0]} on {key[1]} clients is not what {layout.CLIENTS} adds up to"
            )
