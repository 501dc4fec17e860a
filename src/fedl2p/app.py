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
import os
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedl2p.deploy import run_config as runconfig
from fedl2p.deploy.node import Node
from fedl2p.deploy.run_config import RunConfig
from fedl2p.deploy.server import serve
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower.client_app import answer, register, without_paths
from fedl2p.federation.flower.client_directory import read_keys
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.flower.records import CLIENT_FAILED
from fedl2p.federation.flower.shown_log import shown
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
        machine = None
        try:
            machine = Node.of(context.node_config)
            with _on(machine):
                try:
                    return _answered(message, context, study, machine)
                except Exception:
                    log.exception("a message cannot be answered")
                    raise
        except Exception as error:
            if machine is None and "data" not in context.node_config:
                raise
            # Flower would send the whole text, with what it says of the node's files.
            reason = without_paths(f"{type(error).__name__}: {error}")
            return Message(Error(CLIENT_FAILED, reason), reply_to=message)

    register(app, handle)
    return app


def _answered(
    message: Message, context: Context, study: Study | None, machine: Node | None
) -> Message:
    asked = config_of(context) if study is None else RunConfig(study=study)
    node = _resident(json.dumps(to_plain(asked.study)), machine, learns=asked.task == "study")
    return answer(node, message, context, client=None if machine is None else machine.client)


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
        with shown():
            serve(
                dataclasses.replace(asked, out=out or asked.out),
                OnFlower(
                    grid,
                    timeout=asked.timeout or None,
                    grace=(asked.grace or None) if asked.timeout else None,
                    keys=None if asked.keys is None else read_keys(asked.keys),
                ),
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
def _on(machine: Node | None) -> Iterator[None]:
    """Append what happens on a machine of its own to the log in its folder.

    What is written there is its owner's alone.
    """
    if machine is None:
        yield
        return
    before = os.umask(0o077)
    level = log.level
    try:
        machine.out.mkdir(parents=True, exist_ok=True)
        log.setLevel(min(level or logging.INFO, logging.INFO))
        with RunWriter(machine.out).logging():
            yield
    finally:
        log.setLevel(level)
        os.umask(before)


client = client_app()
server = server_app()
