"""The result of a run: one row per method and client, and the table that sums them up."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedl2p.runs.files import damaged, number, read_csv, read_json, write_atomically
from fedl2p.runs.privacy_spent import PrivacySpent, epsilon_words
from fedl2p.runs.text_table import columns

if TYPE_CHECKING:
    from fedl2p.method import Outcome

Pool = Literal["seen", "unseen"]
POOLS: tuple[Pool, ...] = ("seen", "unseen")
CLIENT_COLUMNS = (
    "method",
    "client",
    "pool",
    "num_train",
    "num_test",
    "accuracy_before",
    "accuracy",
    "loss_before",
    "loss",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One client under one method, on its own test part.

    Parameters
    ----------
    method, client
        Names.
    pool
        ``"seen"`` if the client took part in training, else ``"unseen"``.
    num_train, num_test
        Numbers of examples. A client without test examples has NaN accuracies and losses and
        counts in no accuracy.
    accuracy_before, loss_before
        Of the starting model without fine-tuning: fraction in [0, 1], and nats.
    accuracy, loss
        Of the personalized model.
    seconds
        Wall-clock time to personalize this client, evaluation not counted.
    failure
        None, or one line that says why this client has no result; then the other numbers are void.
    """

    method: str
    client: str
    pool: Pool
    num_train: int
    num_test: int
    accuracy_before: float
    accuracy: float
    loss_before: float
    loss: float
    seconds: float
    failure: str | None = None

    def __post_init__(self) -> None:
        where = f"client {self.client!r} of method {self.method!r}"
        if self.pool not in POOLS:
            raise ValueError(f"{where} is in pool {self.pool!r}; a pool is 'seen' or 'unseen'")
        if self.num_train < 0 or self.num_test < 0:
            raise ValueError(f"{where} has a negative number of examples; give counts >= 0")
        if self.failure is None:
            for name in ("accuracy_before", "accuracy"):
                value = getattr(self, name)
                if not (0.0 <= value <= 1.0 or (math.isnan(value) and self.num_test == 0)):
                    raise ValueError(f"{where} has {name} {value}; give a fraction in [0, 1]")

    @classmethod
    def of(cls, method: str, pool: Pool, outcome: Outcome) -> Row:
        """Take the numbers of an outcome; its hyperparameters and profile stay where they are."""
        return cls(
            method=method,
            client=outcome.client,
            pool=pool,
            num_train=outcome.num_train,
            num_test=outcome.num_test,
            accuracy_before=outcome.accuracy_before,
            accuracy=outcome.accuracy,
            loss_before=outcome.loss_before,
            loss=outcome.loss,
            seconds=outcome.seconds,
            failure=outcome.failure,
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
    seconds_per_client
        Plain mean over clients.
    """

    method: str
    pool: Pool
    clients: int
    accuracy_before: float
    accuracy: float
    accuracy_worst_decile: float
    loss: float
    seconds_per_client: float


def summarise(rows: Iterable[Row]) -> tuple[Summary, ...]:
    """Sum up rows per method, in order of first appearance, and pool, seen before unseen."""
    groups: dict[tuple[str, Pool], list[Row]] = {}
    rows = list(rows)
    for method in dict.fromkeys(row.method for row in rows):
        for pool in POOLS:
            group = [r for r in rows if (r.method, r.pool, r.failure) == (method, pool, None)]
            if group:
                groups[method, pool] = group
    return tuple(_summary(method, pool, group) for (method, pool), group in groups.items())


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run found out.

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
        costs. The global model's one journey to each client is not part of it.
    bytes_model
        Bytes of that journey, for one client; 0 if not known.
    privacy
        What differential privacy its stages gave.
    rows
        One per method and client.
    """

    recipe: str
    seed: int
    engine: str
    device: str
    rows: tuple[Row, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes_per_client_round: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bytes_model: int = 0
    privacy: PrivacySpent = field(default_factory=PrivacySpent)

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

    def __str__(self) -> str:
        """Return the table for a terminal, in percent, one block per pool of clients."""
        blocks = [f"{self.recipe}, seed {self.seed}"]
        for pool in POOLS:
            table = [summary for summary in self.methods if summary.pool == pool]
            if table:
                blocks.append("\n".join([f"{pool} clients", *columns(_text_rows(table))]))
        if self.failures:
            names = ", ".join(dict.fromkeys(row.client for row in self.failures))
            blocks.append(f"without a result: {names} (reasons in results.json)")
        if self.privacy.methods:
            spent = [f"{m.method} {epsilon_words(m.epsilon)}" for m in self.privacy.methods]
            delta = self.privacy.methods[0].delta
            blocks.append(f"privacy, epsilon at delta {delta:g}: {', '.join(spent)}")
        return "\n\n".join(blocks)

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
        write_atomically(folder / "clients.csv", _clients_csv(self.rows))
        content = {
            "recipe": self.recipe,
            "seed": self.seed,
            "engine": self.engine,
            "device": self.device,
            "versions": dict(self.versions),
            "seconds": dict(self.seconds),
            "bytes_per_client_round": {k: dict(v) for k, v in self.bytes_per_client_round.items()},
            "bytes_model": self.bytes_model,
            "privacy": self.privacy.to_json(),
            "methods": [_finite(asdict(summary)) for summary in self.methods],
            "failures": [
                {
                    "method": row.method,
                    "client": row.client,
                    "pool": row.pool,
                    "num_train": row.num_train,
                    "num_test": row.num_test,
                    "reason": row.failure,
                }
                for row in self.failures
            ],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / "results.json", text)

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If a file is missing or damaged, or if the two files are not of the same run.
        """
        path = Path(folder) / "results.json"
        content = read_json(path)
        rows = _rows(Path(folder) / "clients.csv")
        try:
            report = cls(
                recipe=str(content["recipe"]),
                seed=int(content["seed"]),
                engine=str(content["engine"]),
                device=str(content["device"]),
                versions={str(k): str(v) for k, v in content["versions"].items()},
                seconds={str(k): float(v) for k, v in content["seconds"].items()},
                bytes_per_client_round={
                    str(stage): {str(way): float(count) for way, count in ways.items()}
                    for stage, ways in content["bytes_per_client_round"].items()
                },
                bytes_model=int(content.get("bytes_model", 0)),
                privacy=PrivacySpent.from_json(content.get("privacy", {})),
                rows=rows + _failed_rows(content.get("failures", [])),
            )
            told = {
                (str(line["method"]), str(line["pool"])): (
                    int(line["clients"]),
                    None if line["accuracy"] is None else float(line["accuracy"]),
                )
                for line in content["methods"]
            }
        except KeyError as error:
            raise damaged(path, f"it has no field {error}") from None
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise damaged(path, f"a field has a wrong type or value ({error})") from None
        _check_same_run(path, told, report.methods)
        return report


def _summary(method: str, pool: Pool, rows: Sequence[Row]) -> Summary:
    judged = [row for row in rows if row.num_test > 0]
    worst = sorted(row.accuracy for row in judged)[: math.ceil(len(judged) / 10)]
    return Summary(
        method=method,
        pool=pool,
        clients=len(rows),
        accuracy_before=_weighted(judged, lambda row: row.accuracy_before),
        accuracy=_weighted(judged, lambda row: row.accuracy),
        accuracy_worst_decile=math.fsum(worst) / len(worst) if worst else math.nan,
        loss=_weighted(judged, lambda row: row.loss),
        seconds_per_client=math.fsum(row.seconds for row in rows) / len(rows),
    )


def _text_rows(table: Sequence[Summary]) -> Sequence[tuple[str, ...]]:
    heads = ("method", "before %", "after %", "worst tenth %", "loss", "s per client", "clients")
    return [heads] + [
        (
            summary.method,
            f"{100 * summary.accuracy_before:.2f}",
            f"{100 * summary.accuracy:.2f}",
            f"{100 * summary.accuracy_worst_decile:.2f}",
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


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _clients_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CLIENT_COLUMNS)
    for row in rows:
        if row.failure is None:
            writer.writerow([getattr(row, column) for column in CLIENT_COLUMNS])
    return text.getvalue()


def _rows(path: Path) -> tuple[Row, ...]:
    rows = []
    for line in read_csv(path, CLIENT_COLUMNS):
        pool: Pool = "seen" if line["pool"] == "seen" else "unseen"
        if pool != line["pool"]:
            raise damaged(path, f"column pool holds {line['pool']!r}, not 'seen' or 'unseen'")
        try:
            row = Row(
                method=line["method"],
                client=line["client"],
                pool=pool,
                num_train=int(line["num_train"]),
                num_test=int(line["num_test"]),
                accuracy_before=number(path, line, "accuracy_before"),
                accuracy=number(path, line, "accuracy"),
                loss_before=number(path, line, "loss_before"),
                loss=number(path, line, "loss"),
                seconds=number(path, line, "seconds"),
            )
        except ValueError as error:
            if str(path) in str(error):
                raise
            raise damaged(path, str(error)) from None
        rows.append(row)
    return tuple(rows)


def _failed_rows(failures: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(
        Row(
            method=str(failure["method"]),
            client=str(failure["client"]),
            pool=failure["pool"],
            num_train=int(failure["num_train"]),
            num_test=int(failure["num_test"]),
            accuracy_before=math.nan,
            accuracy=math.nan,
            loss_before=math.nan,
            loss=math.nan,
            seconds=math.nan,
            failure=str(failure["reason"]),
        )
        for failure in failures
    )


def _check_same_run(
    path: Path,
    told: Mapping[tuple[str, str], tuple[int, float | None]],
    summaries: Sequence[Summary],
) -> None:
    found = {(s.method, s.pool): (s.clients, s.accuracy) for s in summaries}
    for key in dict.fromkeys([*told, *found]):
        if key not in told or key not in found:
            where = "clients.csv" if key in found else "results.json"
            raise damaged(path, f"{key[0]} on {key[1]} clients is in {where} only")
        clients, accuracy = found[key]
        same = told[key][1] is None or math.isclose(told[key][1] or 0.0, accuracy, abs_tol=1e-9)
        if told[key][0] != clients or not same:
            raise damaged(path, f"{key[0]} on {key[1]} clients is not what clients.csv adds up to")
