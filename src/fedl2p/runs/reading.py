"""Everything that the files of a run folder say, read at once and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedl2p.runs.files import damaged, number, read_config, read_csv, read_json
from fedl2p.runs.results import Report

ROUND_COLUMNS = (
    "stage",
    "round",
    "clients",
    "loss",
    "accuracy",
    "seconds",
    "bytes_down",
    "bytes_up",
    "failures",
)


@dataclass(frozen=True, kw_only=True)
class RoundLine:
    """One line of ``rounds.csv``. Loss and accuracy judge the state received in that round."""

    stage: str
    round: int
    clients: int
    loss: float
    accuracy: float
    seconds: float
    bytes_down: float
    bytes_up: float
    failures: int


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What one client fine-tuned with, and the divergences behind it (None: unknown)."""

    client: str
    mix: Mapping[str, float]
    rate: Mapping[str, float]
    divergence: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The content of a run folder.

    Parameters
    ----------
    report
        ``results.json`` and ``clients.csv``.
    config
        ``config.json``: the resolved study.
    rounds
        ``rounds.csv``.
    about
        Client name to what ``population.json`` knows of it.
    strategies
        Method to client to :class:`Strategy`, from ``clients/<method>/``. They never leave their
        clients, so a run on many machines may hold some or none.
    """

    path: Path
    report: Report
    config: Mapping[str, Any]
    rounds: tuple[RoundLine, ...]
    about: Mapping[str, Mapping[str, str | float]]
    strategies: Mapping[str, Mapping[str, Strategy]]


def read_run(folder: str | Path) -> RunFolder:
    """Read a run folder.

    Raises
    ------
    ValueError
        In one line that names the file and what to do, if a file is missing, damaged, or not of
        the same run as the others.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder that `fedl2p run --out` wrote")
    report = Report.load(path)
    about = _read_about(path / "population.json")
    strangers = [row.client for row in report.rows if row.client not in about]
    if strangers:
        raise damaged(path / "population.json", f"it lacks client {strangers[0]!r} of clients.csv")
    return RunFolder(
        path=path,
        report=report,
        config=read_config(path / "config.json")[0],
        rounds=_read_rounds(path / "rounds.csv"),
        about=about,
        strategies=_read_strategies(path / "clients", about),
    )


def _read_about(path: Path) -> dict[str, dict[str, str | float]]:
    clients = read_json(path).get("clients")
    if not isinstance(clients, dict):
        raise damaged(path, "it has no field 'clients' with one entry per client")
    about: dict[str, dict[str, str | float]] = {}
    for name, entry in clients.items():
        known = entry.get("about", {}) if isinstance(entry, dict) else None
        if not isinstance(known, dict):
            raise damaged(path, f"the entry of client {name!r} is not an object with 'about'")
        about[name] = {k: v for k, v in known.items() if isinstance(v, str | int | float)}
    return about


def _read_rounds(path: Path) -> tuple[RoundLine, ...]:
    def whole(line: dict[str, str], column: str) -> int:
        value = number(path, line, column)
        if not value.is_integer():
            raise damaged(path, f"column {column} holds {line[column]!r}, not a whole number")
        return int(value)

    return tuple(
        RoundLine(
            stage=line["stage"],
            round=whole(line, "round"),
            clients=whole(line, "clients"),
            loss=number(path, line, "loss"),
            accuracy=number(path, line, "accuracy"),
            seconds=number(path, line, "seconds"),
            bytes_down=number(path, line, "bytes_down"),
            bytes_up=number(path, line, "bytes_up"),
            failures=whole(line, "failures"),
        )
        for line in read_csv(path, ROUND_COLUMNS)
    )


def _read_strategies(
    folder: Path, known: Mapping[str, Mapping[str, str | float]]
) -> dict[str, dict[str, Strategy]]:
    methods: dict[str, dict[str, Strategy]] = {}
    for path in sorted(folder.glob("*/*.json")):
        method, strategy = _read_strategy(path)
        if strategy.client not in known:
            raise damaged(path, f"client {strategy.client!r} is not in population.json")
        methods.setdefault(method, {})[strategy.client] = strategy
    return methods


def _read_strategy(path: Path) -> tuple[str, Strategy]:
    content = read_json(path)
    try:
        divergence = content["divergence"]
        # The names are read from within: those of file and folder are quoted.
        return str(content["method"]), Strategy(
            client=str(content["client"]),
            mix=_numbers(content["mix"]),
            rate=_numbers(content["rate"]),
            divergence=None if divergence is None else _numbers(divergence),
        )
    except KeyError as error:
        raise damaged(path, f"it has no field {error}") from None
    except (AttributeError, TypeError, ValueError):
        raise damaged(path, "mix, rate and divergence must be objects of numbers") from None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float("nan") if v is None else float(v) for name, v in values.items()}
