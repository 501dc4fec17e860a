"""The server of a federation of machines: wait for clients, run the study, serve latecomers."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path

from fedl2p import methods
from fedl2p.data.remote import Remote
from fedl2p.deploy.run_config import RunConfig
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.flower.gathering import wait_for_clients
from fedl2p.federation.flower.shown_log import LogListener
from fedl2p.federation.listeners import Listener, TensorBoardListener
from fedl2p.federation.personalizing import personalize_all
from fedl2p.runs import layout
from fedl2p.runs.config import differences
from fedl2p.runs.folder import RunWriter
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.results import Report, Row
from fedl2p.study.new_client import load_run
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study

log = logging.getLogger("fedl2p")


def serve(config: RunConfig, clients: OnFlower) -> None:
    """Do what a run configuration asks for.

    Parameters
    ----------
    config
        The study, and what to do about it.
    clients
        Where they are.

    Raises
    ------
    ValueError
        If something asked for cannot be done; one line that says why.
    """
    study = config.study
    if config.task == "personalize":
        serve_latecomers(config, clients)
        return
    if isinstance(study.data, Remote):
        study.data.check()
        names = gather(clients, config)
        study = dataclasses.replace(study, data=dataclasses.replace(study.data, clients=names))
    listeners: list[Listener] = [LogListener()]
    if config.tensorboard and config.out is not None:
        listeners.append(TensorBoardListener(config.out / layout.TENSORBOARD))
    run_study(
        study,
        config.out,
        resume=config.resume,
        progress=False,
        listeners=listeners,
        clients=clients,
    )
    if config.out is not None:
        # Not at the top: nodes load this file too, and need no jinja2.
        from fedl2p.reporting.page import write_page

        write_page(config.out)
        log.info("results are in %s", config.out.absolute())


def serve_latecomers(config: RunConfig, clients: OnFlower) -> None:
    """Have clients that took no part in a finished study personalize themselves.

    They are sent the global model and the meta-nets; only numbers come back.

    Raises
    ------
    ValueError
        If the run's folder lacks something, the run configuration describes another model or other
        settings than that study, ``out`` holds results, or nobody new answers.
    """
    assert config.run is not None
    study, model, metanets = load_run(config.run, model=config.study.model)
    _refuse_other(config, study, config.run)
    if config.out is not None and (config.out / layout.RESULTS).exists():
        raise ValueError(f"{config.out} already holds {layout.RESULTS}; give another folder")
    method = methods.build(methods.METANETS, study.settings)
    took_part = set(PopulationInfo.read(config.run).clients)
    names = gather(clients, config, without=took_part)
    assert isinstance(config.study.data, Remote)
    source = dataclasses.replace(config.study.data, clients=names)
    outcomes = personalize_all(
        method,
        model,
        metanets.state_dict(),
        source.open(study.seed),
        seed=study.seed,
        clients=clients,
        has_accuracy=study.has_accuracy,
    )
    rows = tuple(Row.of(method.name, "unseen", outcome) for outcome in outcomes)
    report = Report(
        recipe=study.recipe, seed=study.seed, engine="flower", device=study.device, rows=rows
    )
    log.info("personalized %s\n%s", ", ".join(names), report)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        report.save(config.out)


def gather(
    clients: OnFlower, config: RunConfig, *, without: Collection[str] = ()
) -> tuple[str, ...]:
    """Wait for the clients that a run configuration asks for, as :func:`wait_for_clients` does.

    What happens meanwhile is in the log of the run's folder, unless that holds results already.
    """
    with contextlib.ExitStack() as stack:
        if config.out is not None and not (config.out / layout.RESULTS).exists():
            config.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunWriter(config.out).logging())
        return wait_for_clients(
            clients.directory,
            count=config.min_clients,
            names=config.clients,
            seconds=config.wait,
            without=without,
        )


def _refuse_other(config: RunConfig, study: Study, run: Path) -> None:
    """Refuse a run configuration under which nodes would build or tune another model."""
    here = config.study
    if not isinstance(here.data, Remote):
        raise ValueError(
            f"the recipe {here.recipe!r} brings clients of its own; the task 'personalize' is for "
            "clients on nodes, with the recipe 'federation'"
        )
    here.data.check()
    population = PopulationInfo.read(run)
    same = ("model", "settings", "loss", "ignore_index", "metric", "outputs")
    there = dataclasses.replace(here, **{name: getattr(study, name) for name in same})
    different = differences(there, here)
    for name, value in (("shape", population.shape), ("classes", population.classes)):
        if getattr(here.data, name) != value:
            different.append(f"data.{name} is {value!r} and {getattr(here.data, name)!r}")
    if different:
        raise ValueError(
            f"the run in {run} and the run configuration differ (there and here): "
            f"{'; '.join(different[:3])}; give the keys that the run was started with"
        )
