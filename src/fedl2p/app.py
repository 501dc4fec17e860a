"""The Flower app: the same study as a ClientApp and a ServerApp.

``client_app(study)`` and ``server_app(study)`` are for Python; ``client`` and ``server`` are the
pair that ``flwr run`` loads, which take everything from the run's configuration (the section
``tool.flwr.app.config`` of pyproject.toml, and ``--run-config``; see
:mod:`fedl2p.deploy.run_config`) and, on a machine of its own, from the node's (see
:mod:`fedl2p.deploy.node`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from fedl2p.thread_waiting import wait_asleep

wait_asleep()  # before anything imports torch

# ruff: noqa: E402
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedl2p.deploy import run_config as runconfig
from fedl2p.deploy.node import Node
from fedl2p.deploy.run_config import RunConfig
from fedl2p.deploy.server import serve
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower.client_app import answer
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.flower.records import ACTIONS, QUERY
from fedl2p.runs.folder import RunWriter
from fedl2p.runs.validation import from_plain, to_plain
from fedl2p.study.engines import device_of, node_of
from fedl2p.study.settings import Study

log = logging.getLogger("fedl2p")


def client_app(study: Study | None = None) -> ClientApp:
    """Return the app that a node runs; it answers one message at a time.

    Parameters
    ----------
    study
        What the node takes part in; None to take it from the run's configuration. The model and the
        data are made with the first message and stay in the process for the later ones, also where
        a runtime makes the app anew for each.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        machine = Node.of(context.node_config)
        with _log_of(machine):
            asked = config_of(context) if study is None else RunConfig(study=study)
            resident = _resident(
                json.dumps(to_plain(asked.study)), machine, learns=asked.task == "study"
            )
            if machine is not None:
                context.node_config["client"] = machine.client
            return answer(resident, message, context)

    register = {"query": app.query, "train": app.train, "evaluate": app.evaluate}
    for message_type in (QUERY, *ACTIONS):
        category, name = message_type.split(".")
        register[category](name)(handle)
    return app


@functools.lru_cache(maxsize=1)
def _resident(study: str, machine: Node | None, *, learns: bool) -> ClientNode:
    """Return this process's node for a study, given as JSON; made once."""
    built = from_plain(Study, json.loads(study))
    if machine is None:
        return node_of(built, device=device_of(built))
    return machine.client_node(built, split=learns)


def server_app(study: Study | None = None, *, out: Path | None = None) -> ServerApp:
    """Return the app that drives a study on any Flower grid.

    Parameters
    ----------
    study
        What to do; None to take it from the run's configuration.
    out
        Folder for the results; None for the run configuration's ``out``, and if there is none
        either, nothing is kept.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        asked = config_of(context) if study is None else RunConfig(study=study)
        with _shown():
            serve(
                dataclasses.replace(asked, out=out or asked.out),
                OnFlower(grid, timeout=asked.timeout or None),
            )

    return app


def config_of(context: Context) -> RunConfig:
    """Return what a run's configuration asks for.

    Raises
    ------
    ValueError
        If a key or a value in it cannot be used.
    """
    asked = runconfig.read(context.run_config)
    if asked.out is None:
        return asked
    folder = Path(str(asked.out).replace("{run-id}", str(context.run_id)))
    return dataclasses.replace(asked, out=folder)


def study_of(context: Context) -> Study:
    """Return the study that a run's configuration describes, as :func:`config_of` does."""
    return config_of(context).study


@contextlib.contextmanager
def _log_of(machine: Node | None) -> Iterator[None]:
    """Append what happens on a machine of its own to the log in its folder."""
    if machine is None:
        yield
        return
    machine.out.mkdir(parents=True, exist_ok=True)
    with RunWriter(machine.out).logging():
        yield


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Show the package's log on stderr, where ``flwr log`` and the SuperLink take it from."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fedl2p: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


client = client_app()
server = server_app()
