"""What runs the clients of a study: this process, Ray's workers, or a Flower node."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedl2p import methods, models
from fedl2p.core.functional.precision import with_compute
from fedl2p.data.population import Population
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode, OnPersonalized
from fedl2p.federation.messages import Clients
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.method import Method, Outcome, State
from fedl2p.runs.client_files import write_hyperparams

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


def node_of(
    study: Study,
    population: Population | None = None,
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    received: Path | None = None,
    on_personalized: OnPersonalized | None = None,
    wants_models: bool = False,
    simulated: bool = False,
) -> ClientNode:
    """Return the node that answers for the clients of a study in one process.

    Parameters
    ----------
    study
        What they take part in.
    population
        The clients, if they are open already; None to open them.
    device
        Where they compute.
    folder
        The run's folder, where clients' hyperparameters are written; None to write none.
    received, on_personalized, wants_models
        For a machine of its own: where global models are kept, and what is done with a personalized
        client (see :class:`~fedl2p.federation.clients.node.ClientNode`).
    simulated
        True if all clients are on this machine, so that privacy may draw its noise from the seed.
    """
    opened = study.data.open(study.seed) if population is None else population
    names = dict.fromkeys((methods.PRETRAINING, *study.methods))
    built = [methods.build(name, study.settings) for name in names]

    def write(method: str, model: nn.Module, state: State, outcome: Outcome) -> None:
        assert folder is not None
        write_hyperparams(folder, method, outcome)

    return ClientNode(
        build=lambda: with_compute(
            models.build(study.model, shape=opened.shape, classes=opened.classes, seed=study.seed),
            study.compute,
        ),
        population=opened,
        methods={method.name: method for method in built},
        device=device,
        models=received,
        on_personalized=on_personalized if folder is None else write,
        wants_models=wants_models,
        privacy=privacy_of(study, built),
        simulated=simulated,
    )


def privacy_of(study: Study, built: Sequence[Method]) -> dict[str, Privacy]:
    """Return what privacy the study asks for in the rounds of each method, by its name."""
    settings = {"pretrain": study.pretrain.privacy, "learn": study.learn.privacy}
    return {m.name: settings[m.rounds] for m in built if m.rounds in settings}


def clients_of(
    study: Study, population: Population, *, device: torch.device, folder: Path
) -> Clients:
    """Return the clients of a study on the engine that it names; to be closed after use.

    Raises
    ------
    ValueError
        If no worker of Ray's fits into this machine.
    ModuleNotFoundError
        If the engine is not installed.
    """
    if study.engine == "ray":
        from fedl2p.federation.clients.ray import OnRay

        make = functools.partial(
            node_of, study, device=device, folder=folder.absolute(), simulated=True
        )
        return OnRay(
            make, population.names, stack_size=study.compute.stack_size, resources=study.ray
        )
    return InProcess(node_of(study, population, device=device, folder=folder, simulated=True))
