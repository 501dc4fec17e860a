"""The Flower app: the same study as a ClientApp and a ServerApp.

``client_app(study)`` and ``server_app(study)`` are for Python; ``client`` and ``server`` are the
pair that ``flwr run`` loads, which take everything from the run's configuration
(:mod:`fedl2p.runconfig`) and, on a machine of its own, from the node's (:mod:`fedl2p.node`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedl2p import methods, models, runconfig
from fedl2p.federation import Handler, Nodes
from fedl2p.federation.wire import ACTIONS
from fedl2p.node import Node
from fedl2p.rundir import RunDir
from fedl2p.serving import serve
from fedl2p.study import Study, run_study


def client_app(study: Study | None = None) -> ClientApp:
    """Return the app that a node runs; it answers one message at a time.

    Parameters
    ----------
    study
        What the node takes part in; None to take it from the run's configuration. The model and the
        data are made with the first message and stay for the later ones that the process gets.
    """
    app = ClientApp()
    handlers: dict[tuple[Study, Node | None, bool], Handler] = {}

    def answer(message: Message, context: Context) -> Message:
        node = Node.of(context.node_config)
        with _node_log(node):
            asked = runconfig.read(context.run_config) if study is None else None
            mine = study if asked is None else asked.study
            assert mine is not None
            learns = asked is None or asked.task == "study"
            key = (mine, node, learns)
            if key not in handlers:
                handlers[key] = (
                    handler_of(mine) if node is None else node.handler(mine, split=learns)
                )
            if node is not None:
                context.node_config["client"] = node.client
            return handlers[key].handle([message], [context])[0]

    for action in ACTIONS:
        category, name = action.split(".")
        {"query": app.query, "train": app.train, "evaluate": app.evaluate}[category](name)(answer)
    return app


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
        if study is not None:
            run_study(study, out, nodes=Nodes(grid))
            return
        asked = runconfig.read(context.run_config)
        with _shown():
            serve(
                dataclasses.replace(asked, out=out or asked.out),
                Nodes(grid, timeout=asked.timeout or None),
            )

    return app


def study_of(context: Context) -> Study:
    """Return the study that a run's configuration describes.

    Raises
    ------
    ValueError
        If a key or a value in it cannot be used.
    """
    return runconfig.read(context.run_config).study


def handler_of(study: Study) -> Handler:
    """Return what answers for the clients of a study on a simulated node."""
    population = study.data.open(study.seed)
    names = dict.fromkeys(("fedavg", *study.methods))
    built = [methods.build(name, study.settings) for name in names]
    built += [methods.build(m.preparation, study.settings) for m in built if m.preparation]
    return Handler(
        build=lambda: models.build(
            study.model, shape=population.shape, classes=population.classes, seed=study.seed
        ),
        population=population,
        methods={method.name: method for method in built},
        live=False,
    )


@contextlib.contextmanager
def _node_log(node: Node | None) -> Iterator[None]:
    """Append what happens on a machine of its own to the log in its folder."""
    if node is None:
        yield
        return
    node.out.mkdir(parents=True, exist_ok=True)
    with RunDir(node.out).logging():
        yield


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Show the package's log on stderr, where ``flwr log`` and the SuperLink take it from."""
    logger, handler = logging.getLogger("fedl2p"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fedl2p: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


client = client_app()
server = server_app()
