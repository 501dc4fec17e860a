"""What runs the clients of a study: this process, Ray's workers, or a Flower node."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedl2p import methods, models
from fedl2p.core.functional.precision import computing
from fedl2p.data.population import Population
from fedl2p.federation.clients.in_process import InProcessGrid
from fedl2p.federation.clients.node import Handler, Keeper
from fedl2p.federation.clients.ray import RayGrid
from fedl2p.federation.flower.client_directory import Nodes
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.method import Method

if TYPE_CHECKING:
    from fedl2p.study.settings import Study


def find_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` stands for here.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}, but must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_of(study: Study) -> torch.device:
    """Return where the clients of a study compute; under ray, what its workers are given.

    Raises
    ------
    ValueError
        If there is no such device, or Ray's workers are given none of it.
    """
    device, share = find_device(study.device), study.ray.gpus_per_worker
    if study.engine != "ray":
        return device
    if study.device == "cuda" and not share:
        raise ValueError(
            "device cuda under engine ray needs ray.gpus_per_worker above 0, e.g. 0.5 for two "
            "workers on a GPU"
        )
    if share and device.type != "cuda":
        raise ValueError(
            f"ray.gpus_per_worker is {share:g}, but the device is cpu; use 0, or device cuda"
        )
    return torch.device("cuda" if share else "cpu")


def handler_of(
    study: Study,
    population: Population | None = None,
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    received: Path | None = None,
    keeper: Keeper | None = None,
    live: bool = False,
    simulated: bool = False,
) -> Handler:
    """Return what answers for the clients of a study in one process.

    Parameters
    ----------
    study
        What they take part in.
    population
        The clients, if they are open already; None to open them.
    device
        Where they compute.
    folder
        Where the files that stay with the clients are written; None to write none.
    received, keeper
        For a machine of its own: where global models are kept, and what writes down personalized
        ones (see :class:`~fedl2p.federation.Handler`).
    live
        True if replies stay in this process, so that nothing needs to be encoded.
    simulated
        True if all clients are on this machine, so that privacy may draw its noise from the seed.
    """
    opened = study.data.open(study.seed) if population is None else population
    names = dict.fromkeys((methods.PRETRAINING, *study.methods))
    built = [methods.build(name, study.settings) for name in names]
    return Handler(
        build=lambda: computing(
            models.build(study.model, shape=opened.shape, classes=opened.classes, seed=study.seed),
            study.compute,
        ),
        population=opened,
        methods={method.name: method for method in built},
        device=device,
        folder=folder,
        models=received,
        keeper=keeper,
        live=live,
        privacy=privacy_of(study, built),
        simulated=simulated,
    )


def privacy_of(study: Study, built: Sequence[Method]) -> dict[str, Privacy]:
    """Return what privacy the study wants for the rounds of each method, by its name."""
    wanted = {"pretrain": study.pretrain.privacy, "learn": study.learn.privacy}
    return {m.name: wanted[m.rounds] for m in built if m.rounds in wanted}


def nodes_of(study: Study, population: Population, *, device: torch.device, folder: Path) -> Nodes:
    """Return the clients of a study on the engine that it names; to be closed after use.

    Raises
    ------
    ValueError
        If no worker of Ray's fits into this machine.
    ModuleNotFoundError
        If the engine is not installed.
    """
    if study.engine == "ray":
        make = functools.partial(
            handler_of, study, device=device, folder=folder.absolute(), simulated=True
        )
        # Workers need parts to share out: without a number of clients per call, one client each.
        return Nodes(RayGrid(make, population.names, cohort=study.cohort or 1, resources=study.ray))
    handler = handler_of(study, population, device=device, folder=folder, live=True, simulated=True)
    return Nodes(InProcessGrid(handler, cohort=study.cohort))
