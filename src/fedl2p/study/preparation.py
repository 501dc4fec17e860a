"""What a run needs, checked and made before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedl2p import methods
from fedl2p.core.data_check import check_client
from fedl2p.core.functional.copies import duplicate
from fedl2p.core.functional.state_tensors import load_state_tensors
from fedl2p.core.working_copies import working_copies
from fedl2p.data.population import Population
from fedl2p.federation.listeners import CsvListener, FailuresListener, Listener
from fedl2p.federation.messages import Clients
from fedl2p.federation.privacy import accounting
from fedl2p.federation.round_records import Federated
from fedl2p.federation.rounds import federate
from fedl2p.method import Method
from fedl2p.models.resnet import load_checkpoint
from fedl2p.runs import layout
from fedl2p.runs.folder import RunWriter
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.engines import build_model, clients_of, device_of
from fedl2p.study.settings import Study


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What does not change during a run.

    Parameters
    ----------
    study, resume, listeners
        As given to ``run_study``, and the listeners that write the folder's tables.
    folder
        The run's folder.
    population, info
        The clients with their data, and what the folder says of them.
    initial
        The model with its initial weights.
    given
        The global model of a file; None to pre-train one.
    pretraining
        The population that the global model is pre-trained on; None for ``population``.
    methods
        The methods to compare.
    device
        Where models and data are.
    clients
        Answer the questions of the rounds.
    external
        Whether ``clients`` were given to ``run_study`` and are not closed by it.
    """

    study: Study
    folder: RunWriter
    resume: bool
    listeners: tuple[Listener, ...]
    population: Population
    info: PopulationInfo
    initial: nn.Module
    given: nn.Module | None
    pretraining: Population | None
    methods: tuple[Method, ...]
    device: torch.device
    clients: Clients
    external: bool

    @property
    def federate(self) -> Callable[..., Federated]:
        """``federate`` with all arguments that are the same for every stage."""
        return functools.partial(
            federate,
            population=self.population,
            seed=self.study.seed,
            clients=self.clients,
            listeners=self.listeners,
            resume=self.resume,
        )

    def checkpoint(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints."""
        return layout.stage_checkpoint(self.folder.path, stage)

    def close(self) -> None:
        """Stop the engine, if this run started it."""
        if not self.external:
            self.clients.close()


def build_methods(study: Study) -> tuple[Method, ...]:
    """Return the methods of a study.

    Raises
    ------
    ValueError
        If there is no such method, it cannot be used, or two have the same name.
    """
    built = tuple(methods.build(name, study.settings) for name in study.methods)
    names = [method.name for method in built]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"method {name!r} is named twice; name each once")
    return built


def count_stages(study: Study) -> int:
    """Return how many stages a run has: pre-training, methods with rounds, personalizations."""
    built = build_methods(study)
    rounds = [m for m in built if m.rounds != "none" and not m.trained_by_pretraining]
    return (study.pretrained is None) + len(rounds) + len(built)


def prepare(
    study: Study,
    out: Path,
    *,
    resume: bool,
    listeners: Sequence[Listener],
    clients: Clients | None = None,
) -> RunContext:
    """Check and make everything that can fail; write nothing.

    Raises
    ------
    ValueError
        If the folder holds another run, or a part of the study cannot be used.
    """
    folder = RunWriter(out)
    folder.check(study, resume=resume)
    device = device_of(study)
    built = build_methods(study)
    population = study.data.open(study.seed)
    pretraining = None if study.pretrained else population.pretraining()
    if pretraining is not None:
        study.pretrain.cohort(len(pretraining.seen))
        if study.pretrain.privacy.on:
            raise ValueError(
                "pretrain.privacy protects clients, but the global model of this data set is "
                "pre-trained on other data, none of theirs; leave it out"
            )
    for rounds in (study.pretrain, study.learn):
        rounds.cohort(len(population.seen))
        if rounds.privacy.on:
            accounting.check_installed()
    initial = build_model(study, population)
    given = _given(study, initial)
    working_copies(initial).net.foresee(population.shape)
    for method in built:
        method.start(initial)  # refuses a model without the parts that the method needs
    info = PopulationInfo.of(population)
    external = clients is not None
    if clients is None:
        # What is wrong with every client's data is said here; the others are checked one by one.
        first = population.seen[0]
        check_client(working_copies(initial).net, population.open(first), first)
        clients = clients_of(study, population, device=device, folder=out)
    return RunContext(
        study=study,
        folder=folder,
        resume=resume,
        listeners=(
            CsvListener(out / layout.ROUNDS),
            FailuresListener(out / layout.FAILURES),
            *listeners,
        ),
        population=population,
        info=info,
        initial=initial,
        given=given,
        pretraining=pretraining,
        methods=built,
        device=device,
        clients=clients,
        external=external,
    )


def check_pretrained(study: Study) -> None:
    """Raise ValueError if the file of the global model is missing, with the command that makes it.

    Where the study does not know that command, reading the file will say what is wrong.
    """
    if study.pretrained is None or not study.pretrained_by:
        return
    if not study.pretrained.exists():
        raise ValueError(
            f"the global model {study.pretrained} is missing; it comes from "
            f"`{study.pretrained_by}`, or name another file by --pretrained"
        )


def _given(study: Study, initial: nn.Module) -> nn.Module | None:
    """Return the global model of a file, if the study names one."""
    if study.pretrained is None:
        return None
    check_pretrained(study)
    return _load_weights(initial, study.pretrained)


def _load_weights(initial: nn.Module, path: Path) -> nn.Module:
    """Return a copy of the model with the weights of a file."""
    model = duplicate(initial)
    if path.suffix == ".pth":
        load_checkpoint(model, path)
        return model
    try:
        load_state_tensors(model, load_tensors(path))
    except RuntimeError as problem:
        raise ValueError(
            f"the weights in {path} do not fit the model ({' '.join(str(problem).split())}); give "
            "weights of the same model, by the names of its state_dict"
        ) from None
    return model
