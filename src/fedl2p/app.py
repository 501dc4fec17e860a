"""The Flower app: the same study as a ClientApp and a ServerApp.

``client_app(study)`` and ``server_app(study)`` are for Python; ``client`` and ``server`` are the
pair that ``flwr run`` loads, which take the name of the recipe and the seed from the run's
configuration.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedl2p import methods, models, recipes
from fedl2p.federation import Handler, Nodes
from fedl2p.federation.wire import ACTIONS
from fedl2p.stages import privacy_of
from fedl2p.study import Study, run_study


def client_app(study: Study | None = None) -> ClientApp:
    """Return the app that a node runs; it answers one message at a time.

    Parameters
    ----------
    study
        What the node takes part in; None to take it from the run's configuration. The model and the
        data are made with the first message and stay for the later ones.
    """
    app = ClientApp()
    handlers: dict[tuple[str, int], Handler] = {}

    def answer(message: Message, context: Context) -> Message:
        mine = study or study_of(context)
        key = (mine.recipe, mine.seed)
        if key not in handlers:
            handlers[key] = handler_of(mine)
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
        folder = out or context.run_config.get("out")
        run_study(
            study or study_of(context),
            None if folder is None else Path(str(folder)),
            nodes=Nodes(grid),
        )

    return app


def study_of(context: Context) -> Study:
    """Return the study that a run's configuration names by ``recipe`` and, if given, ``seed``.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    study = recipes.get(str(context.run_config.get("recipe", "digits")))
    seed = context.run_config.get("seed", study.seed)
    return dataclasses.replace(study, seed=int(seed))


def handler_of(study: Study) -> Handler:
    """Return what answers for the clients of a study on a node of its own."""
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
        privacy=privacy_of(study, built),
    )


client = client_app()
server = server_app()
