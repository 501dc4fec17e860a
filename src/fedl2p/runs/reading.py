"""All files of a run's folder, read at once and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedl2p.runs import layout
from fedl2p.runs.client_files import ClientHyperparams
from fedl2p.runs.columns import ROUND_COLUMNS, RoundLine
from fedl2p.runs.config import read_config
from fedl2p.runs.files import damaged, read_table
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.results import Report


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The content of a run's folder.

    Parameters
    ----------
    path
        The folder.
    report
        ``results.json`` and ``clients.csv``.
    config
        ``config.json``: the resolved study.
    rounds
        ``rounds.csv``.
    about
        Client name to what ``population.json`` knows of it.
    strategies
        Method to client to its hyperparameters, from ``clients/<method>/``. They never leave their
        clients, so a run on many machines may hold some or none.
    """

    path: Path
    report: Report
    config: Mapping[str, Any]
    rounds: tuple[RoundLine, ...]
    about: Mapping[str, Mapping[str, str | int | float]]
    strategies: Mapping[str, Mapping[str, ClientHyperparams]]


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's folder.

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
    clients = PopulationInfo.read(path).clients
    for row in report.rows:
        if row.client not in clients:
            population, table = path / layout.POPULATION, layout.CLIENTS
            raise damaged(population, f"it lacks client {row.client!r} of {table}")
    return RunFolder(
        path=path,
        report=report,
        config=read_config(path / layout.CONFIG)[0],
        rounds=tuple(read_table(path / layout.ROUNDS, RoundLine, ROUND_COLUMNS)),
        about={name: client.about for name, client in clients.items()},
        strategies=read_strategies(path, clients),
    )


def read_strategies(
    run: Path, clients: Mapping[str, Any]
) -> dict[str, dict[str, ClientHyperparams]]:
    """Return the hyperparameters of a run's clients by method and client, as far as they are there.

    Raises
    ------
    ValueError
        If a file is damaged, or of another client than ``clients``.
    """
    methods: dict[str, dict[str, ClientHyperparams]] = {}
    for path in layout.client_files(run):
        read = ClientHyperparams.read(path)
        # The names are read from within: those of file and folder are quoted.
        if read.client not in clients:
            raise damaged(path, f"client {read.client!r} is not in {layout.POPULATION}")
        methods.setdefault(read.method, {})[read.client] = read
    return methods
