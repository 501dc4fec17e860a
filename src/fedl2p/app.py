"""The Flower app: the same study as a ClientApp and a ServerApp.

``client_app(study)`` and ``server_app(study)`` are for Python; ``client`` and ``server`` are the
pair that ``flwr run`` loads, which take the study from the run's configuration (the section
``tool.flwr.app.config`` of pyproject.toml, and ``--run-config``):

recipe, seed, device
    As on the command line of ``fedl2p run``.
out
    Folder for the results, relative to where the ServerApp runs, with Flower's id of the run in the
    place of ``{run-id}``; empty to keep none.
resume
    Go on with the run in that folder.
fields
    Other fields of the study as JSON, e.g. ``{"learn": {"rounds": 3}}``; the others keep the
    recipe's values.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedl2p import recipes
from fedl2p.config import from_plain, to_plain
from fedl2p.engines import device_of, handler_of
from fedl2p.federation import Handler, Nodes, sharing
from fedl2p.federation.wire import ACTIONS
from fedl2p.reporting.page import write_page
from fedl2p.study import Study, run_study

# Flower's own, which its command shows.
log = logging.getLogger("flwr")


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

    def answer(message: Message, context: Context) -> Message:
        mine = study or study_of(context)
        return sharing.answer(_resident(json.dumps(to_plain(mine))), message, context)

    for action in ACTIONS:
        category, name = action.split(".")
        {"query": app.query, "train": app.train, "evaluate": app.evaluate}[category](name)(answer)
    return app


@functools.lru_cache(maxsize=1)
def _resident(study: str) -> Handler:
    """Return this process's handler for a study, given as JSON; made once."""
    mine = from_plain(Study, json.loads(study))
    return handler_of(mine, device=device_of(mine))


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
        mine, folder = study or study_of(context), out or _folder_of(context)
        resume = bool(context.run_config.get("resume", False))
        run_study(mine, folder, resume=resume, nodes=Nodes(grid))
        if folder is not None:
            write_page(folder)
            log.info("results are in %s", folder.absolute())

    return app


def _folder_of(context: Context) -> Path | None:
    """Return the folder that a run's configuration names, if it names one."""
    name = str(context.run_config.get("out", ""))
    return Path(name.replace("{run-id}", str(context.run_id))) if name else None


def study_of(context: Context) -> Study:
    """Return the study that a run's configuration describes, see the top of this file.

    Raises
    ------
    ValueError
        If there is no such recipe, or a field does not fit.
    """
    config = context.run_config
    study = recipes.get(str(config.get("recipe", "digits")))
    changes: dict[str, Any] = {k: config[k] for k in ("seed", "device") if k in config}
    try:
        fields = json.loads(str(config.get("fields") or "{}"))
    except json.JSONDecodeError as problem:
        raise ValueError(f"fields in the run's configuration is no JSON: {problem}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"fields in the run's configuration is {fields!r}, wanted a JSON object")
    return from_plain(Study, _merged(to_plain(study), {**fields, **changes}))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with some replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if both else value
    return merged


client = client_app()
server = server_app()
