"""The stages of the main job, in the order in which ``run_study`` calls them."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedl2p import methods, models
from fedl2p.atomic_files import write_tensors
from fedl2p.core.functional.working_copies import working_copies
from fedl2p.data.population import Population
from fedl2p.federation.listeners import CsvListener, FailuresListener, Listener
from fedl2p.federation.messages import Clients, content_hash, state_bytes
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.privacy import accounting
from fedl2p.federation.round_records import RoundRecord
from fedl2p.federation.rounds import federate, spending
from fedl2p.federation.settings import Rounds
from fedl2p.method import Method, State
from fedl2p.models.resnet import load_checkpoint
from fedl2p.runs.files import read_json, write_atomically
from fedl2p.runs.layout import RunDir, load_tensors, versions
from fedl2p.runs.results import Report, Row
from fedl2p.seeds import derive_seed
from fedl2p.study.engines import clients_of, device_of

if TYPE_CHECKING:
    from fedl2p.study.settings import Study

log = logging.getLogger(__name__)

_ONE_ROUND = Rounds(rounds=1, clients_per_round=0, keep="last")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What does not change during a run."""

    study: Study
    folder: RunDir
    resume: bool
    listeners: tuple[Listener, ...]
    population: Population
    initial: nn.Module
    given: nn.Module | None
    methods: tuple[Method, ...]
    device: torch.device
    clients: Clients
    elsewhere: bool

    def close(self) -> None:
        """Stop what the engine started; clients that were given are their giver's to close."""
        if not self.elsewhere:
            self.clients.close()


@dataclass(frozen=True)
class Learned:
    """What came of the rounds of one method, and their records; both may be empty."""

    state: State
    records: tuple[RoundRecord, ...] = ()


@dataclass(frozen=True)
class Pretrained(Learned):
    """The global model besides; ``state`` is FedAvg's, of which it was made."""

    model: nn.Module = field(default_factory=nn.Module)


@dataclass(frozen=True)
class Outcomes:
    """One method's rows and the wall-clock seconds that they took."""

    rows: tuple[Row, ...]
    seconds: float


def prepare(
    study: Study,
    out: Path,
    *,
    resume: bool,
    listeners: Sequence[Listener],
    clients: Clients | None = None,
) -> Job:
    """Check and make everything that can fail before anything is written."""
    device = device_of(study)
    population = study.data.open(study.seed)
    for rounds in (study.pretrain, study.learn):
        rounds.cohort(len(population.seen))
        if rounds.privacy.on:
            accounting.check_installed()
    initial = models.build(
        study.model, shape=population.shape, classes=population.classes, seed=study.seed
    )
    given = _given(study, initial)
    built = tuple(methods.build(name, study.settings) for name in study.methods)
    working_copies(initial).net.foresee(population.shape)
    for method in built:
        method.start(initial)  # refuses a model without the parts that the method needs
    folder = RunDir(out)
    elsewhere = clients is not None
    if clients is None:
        clients = clients_of(study, population, device=device, folder=folder.path)
    folder.claim(study, resume=resume)
    folder.describe_population(population)
    return Job(
        study=study,
        folder=folder,
        resume=resume,
        listeners=(
            CsvListener(folder.file("rounds.csv")),
            FailuresListener(folder.file("failures.csv")),
            *listeners,
        ),
        population=population,
        initial=initial,
        given=given,
        methods=built,
        device=device,
        clients=clients,
        elsewhere=elsewhere,
    )


def _stages_of(
    job: Job, method: Method, pretrained: Pretrained, learned: Learned
) -> list[accounting.Stage]:
    """Return all stages that what a method has learned comes from."""
    names, seed = job.population.seen, job.study.seed
    out = []
    if pretrained.records and (method.trained_by_pretraining or method.starts_from == "pretrained"):
        rounds, travels = job.study.pretrain, bool(pretrained.state)
        records = pretrained.records
        out.append(spending("pretrain", rounds, records, names=names, seed=seed, travels=travels))
    for name in dict.fromkeys(record.stage for record in learned.records):
        rounds, travels = _rounds_of(job, method), bool(learned.state)
        records = learned.records
        out.append(spending(name, rounds, records, names=names, seed=seed, travels=travels))
    return out


def _rounds_of(job: Job, method: Method) -> Rounds:
    """Return the settings of a method's rounds."""
    settings = {"one": _ONE_ROUND, "pretrain": job.study.pretrain, "learn": job.study.learn}
    return settings[method.rounds]


def pretrain(job: Job) -> Pretrained:
    """Return the global model, trained by FedAvg or given, and write global.safetensors."""
    log.info("%s, seed %d, on %s", job.study.recipe, job.study.seed, job.device)
    job.folder.log_other_versions()
    fedavg = methods.build(methods.PRETRAINING, job.study.settings)
    if job.given is not None:
        end = Pretrained(fedavg.start(job.given), model=job.given)
    else:
        done = federate(
            fedavg,
            job.initial,
            job.population,
            rounds=job.study.pretrain,
            seed=job.study.seed,
            stage="pretrain",
            clients=job.clients,
            listeners=job.listeners,
            checkpoint=job.folder.file("checkpoint") / "pretrain",
            resume=job.resume,
        )
        model = copy.deepcopy(job.initial)
        model.load_state_dict(done.state, strict=False)
        end = Pretrained(done.state, done.records, model)
    write_tensors(job.folder.file("global.safetensors"), end.model.state_dict())
    return end


def learn(job: Job, method: Method, model: nn.Module, pretrained: Pretrained) -> Learned:
    """Return what a method has learned from the seen clients; write its meta-nets, if any."""
    if method.trained_by_pretraining:
        return Learned(pretrained.state)
    if method.rounds == "none":
        return Learned(method.start(model, seed=derive_seed(job.study.seed, "start", method.name)))
    done = federate(
        method,
        model,
        job.population,
        rounds=_rounds_of(job, method),
        seed=job.study.seed,
        stage=method.stage,
        clients=job.clients,
        listeners=job.listeners,
        checkpoint=job.folder.file("checkpoint") / method.stage,
        resume=job.resume,
    )
    if (nets := method.final_metanets(model, done.state)) is not None:
        nets.save(job.folder.file("metanets"))
    return Learned(done.state, done.records)


def personalize(job: Job, method: Method, model: nn.Module, state: State) -> Outcomes:
    """Return one row per client, from the checkpoint if the run had come this far before."""
    path = job.folder.file("checkpoint") / "outcomes" / f"{method.name}.json"
    if (stored := _stored(path, method, job.population)) is not None:
        # As if it had been asked just now: the later rounds must not send the model again.
        job.clients.set_has_model(content_hash(dict(model.state_dict())), None)
        return stored
    began = time.perf_counter()
    outcomes = personalize_all(
        method,
        model,
        state,
        job.population,
        seed=job.study.seed,
        clients=job.clients,
        listeners=job.listeners,
    )
    seconds = time.perf_counter() - began
    seen = set(job.population.seen)
    rows = tuple(
        Row.of(method.name, "seen" if outcome.client in seen else "unseen", outcome)
        for outcome in outcomes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"seconds": seconds, "rows": [asdict(row) for row in rows]}
    write_atomically(path, json.dumps(content) + "\n")
    log.info("%s: %d clients personalized in %.1f s", method.name, len(rows), seconds)
    return Outcomes(rows, seconds)


def _stored(path: Path, method: Method, population: Population) -> Outcomes | None:
    """Return the outcomes that a stopped run has written, or None if there are none to be used."""
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        outcomes = Outcomes(tuple(Row(**row) for row in stored["rows"]), float(stored["seconds"]))
        if [(r.method, r.client) for r in outcomes.rows] != [
            (method.name, client) for client in population.names
        ]:
            raise ValueError("its rows are not those of this run's clients")
    except (KeyError, TypeError, ValueError) as problem:
        log.warning("%s cannot be used (%s); personalizing again", path, problem)
        return None
    return outcomes


def report(
    job: Job, pretrained: Pretrained, learned: Sequence[Learned], outcomes: Sequence[Outcomes]
) -> Report:
    """Put everything together."""
    later = [record for done in learned for record in done.records]
    by_stage = {
        "pretrain": [r for r in pretrained.records if r.round <= job.study.pretrain.rounds],
        "learn": [r for r in later if r.stage == "learn" and r.round <= job.study.learn.rounds],
    }
    seconds = {
        "pretrain": math.fsum(record.seconds for record in pretrained.records),
        "learn": math.fsum(record.seconds for record in later),
        "personalize": math.fsum(done.seconds for done in outcomes),
    }
    return Report(
        recipe=job.study.recipe,
        seed=job.study.seed,
        engine="flower" if job.elsewhere else job.study.engine,
        device=job.device.type,
        rows=tuple(row for done in outcomes for row in done.rows),
        versions=versions(),
        seconds={**seconds, "total": math.fsum(seconds.values())},
        bytes_per_client_round={
            stage: _bytes_per_client(records) for stage, records in by_stage.items() if records
        },
        bytes_model=state_bytes(dict(pretrained.model.state_dict())),
        privacy=accounting.spent(
            [
                (method.name, _stages_of(job, method, pretrained, own))
                for method, own in zip(job.methods, learned, strict=True)
            ],
            given=job.given is not None,
            simulated=job.clients.simulated,
        ),
    )


def _bytes_per_client(records: Sequence[RoundRecord]) -> dict[str, float]:
    """Return the mean over the training rounds, without the frozen model's one journey.

    When a client is sent the frozen model depends on what it was asked first, a baseline's
    personalization perhaps: that says nothing of the stage.
    """
    clients = sum(record.clients for record in records)
    return {
        "down": sum(record.bytes_down - record.bytes_model for record in records) / clients,
        "up": sum(record.bytes_up for record in records) / clients,
    }


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
    model = copy.deepcopy(initial)
    if path.suffix == ".pth":
        load_checkpoint(model, path)
        return model
    try:
        model.load_state_dict(load_tensors(path))
    except RuntimeError as problem:
        raise ValueError(
            f"the weights in {path} do not fit the model ({' '.join(str(problem).split())}); give "
            "weights of the same model, by the names of its state_dict"
        ) from None
    return model
