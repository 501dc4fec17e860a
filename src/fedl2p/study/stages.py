"""The stages of a study, in the order in which ``run_study`` calls them."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedl2p import methods
from fedl2p.atomic_files import write_tensors
from fedl2p.core.functional.copies import duplicate
from fedl2p.core.functional.state_tensors import state_tensors
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.messages import content_hash, state_bytes
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.privacy import accounting
from fedl2p.federation.round_records import RoundRecord
from fedl2p.federation.rounds import spending
from fedl2p.federation.settings import Rounds
from fedl2p.method import Method, State
from fedl2p.runs import layout
from fedl2p.runs.folder import versions
from fedl2p.runs.kinds import summarise_kinds
from fedl2p.runs.outcomes import PersonalizedClients
from fedl2p.runs.reading import read_strategies
from fedl2p.runs.results import Report, Row
from fedl2p.seeds import derive_seed
from fedl2p.study.engines import node_of
from fedl2p.study.metanets_card import learned_card
from fedl2p.study.preparation import RunContext
from fedl2p.study.settings import Study

log = logging.getLogger(__name__)

_ONE_ROUND = Rounds(rounds=1, clients_per_round=0, keep="last")


@dataclass(frozen=True)
class TrainedState:
    """What a method has learned from the seen clients; the records of its rounds, maybe none."""

    state: State
    records: tuple[RoundRecord, ...] = ()


@dataclass(frozen=True)
class GlobalModel(TrainedState):
    """The global model; ``state`` is FedAvg's, of which it was made."""

    model: nn.Module = field(default_factory=nn.Module)


def pretrain(run: RunContext) -> GlobalModel:
    """Return the global model, trained by FedAvg or given, and write global.safetensors."""
    log.info("%s, seed %d, on %s", run.study.recipe, run.study.seed, run.device)
    fedavg = methods.build(methods.PRETRAINING, run.study.settings)
    if run.given is not None:
        trained = GlobalModel(fedavg.start(run.given), model=run.given)
    else:
        done = run.federate(
            fedavg,
            run.initial,
            rounds=run.study.pretrain,
            stage="pretrain",
            checkpoint=run.checkpoint("pretrain"),
            **_pretraining_clients(run),
        )
        model = duplicate(run.initial)
        model.load_state_dict(done.state, strict=False)
        trained = GlobalModel(done.state, done.records, model)
    write_tensors(run.folder.path / layout.GLOBAL_MODEL, state_tensors(trained.model))
    return trained


def _pretraining_clients(run: RunContext) -> dict[str, Any]:
    """Return who takes part in pre-training, where it is not the clients of the study."""
    if run.pretraining is None:
        return {}
    node = node_of(run.study, run.pretraining, device=run.device, simulated=True)
    return {"population": run.pretraining, "clients": InProcess(node)}


def learn(
    run: RunContext, method: Method, model: nn.Module, pretrained: GlobalModel
) -> TrainedState:
    """Return what a method has learned from the seen clients; write its meta-nets, if any."""
    if method.trained_by_pretraining:
        return TrainedState(pretrained.state)
    if method.rounds == "none":
        seed = derive_seed(run.study.seed, "start", method.name)
        return TrainedState(method.start(model, seed=seed))
    done = run.federate(
        method,
        model,
        rounds=_rounds_of(run.study, method),
        stage=method.stage,
        checkpoint=run.checkpoint(method.stage),
    )
    if (nets := method.final_metanets(model, done.state)) is not None:
        nets.card = learned_card(
            nets,
            model,
            method,
            rounds=_rounds_of(run.study, method),
            clients=run.clients,
            seen=len(run.population.seen),
            seed=run.study.seed,
            data_licence=getattr(run.study.data, "licence", None),
        )
        nets.save(run.folder.path)
    return TrainedState(done.state, done.records)


def _rounds_of(study: Study, method: Method) -> Rounds:
    """Return the rounds that a method trains for, one if it needs a single one."""
    return {"pretrain": study.pretrain, "learn": study.learn}.get(method.rounds, _ONE_ROUND)


def personalize(
    run: RunContext, method: Method, model: nn.Module, state: State
) -> PersonalizedClients:
    """Return one row per client, from the checkpoint if the run had come this far before."""
    if (stored := _stored(run, method)) is not None:
        # As if it had been asked just now: the later rounds must not send the model again.
        run.clients.set_has_model(content_hash(state_tensors(model)), None)
        return stored
    began = time.perf_counter()
    outcomes = personalize_all(
        method,
        model,
        state,
        run.population,
        seed=run.study.seed,
        clients=run.clients,
        listeners=run.listeners,
    )
    seconds = time.perf_counter() - began
    pools = {name: client.pool for name, client in run.info.clients.items()}
    rows = tuple(Row.of(method.name, pools[outcome.client], outcome) for outcome in outcomes)
    personalized = PersonalizedClients(rows=rows, seconds=seconds)
    personalized.write(layout.outcomes_file(run.folder.path, method.name))
    good = sum(row.failure is None for row in rows)
    log.info("%s: %d of %d clients personalized in %.1f s", method.name, good, len(rows), seconds)
    return personalized


def _stored(run: RunContext, method: Method) -> PersonalizedClients | None:
    """Return the rows that a stopped run has written, or None if there are none to be used."""
    path = layout.outcomes_file(run.folder.path, method.name)
    if not path.exists():
        return None
    try:
        stored = PersonalizedClients.read(path)
        if [(row.method, row.client) for row in stored.rows] != [
            (method.name, client) for client in run.population.names
        ]:
            raise ValueError("its rows are not those of this run's clients")
    except ValueError as problem:
        log.warning("%s cannot be used (%s); personalizing again", path, problem)
        return None
    return stored


def report(
    run: RunContext,
    pretrained: GlobalModel,
    learned: Sequence[TrainedState],
    personalized: Sequence[PersonalizedClients],
) -> Report:
    """Return the report of a run."""
    later = [record for trained in learned for record in trained.records]
    by_stage = {
        "pretrain": [r for r in pretrained.records if r.round <= run.study.pretrain.rounds],
        "learn": [r for r in later if r.stage == "learn" and r.round <= run.study.learn.rounds],
    }
    seconds = {
        "pretrain": math.fsum(record.seconds for record in pretrained.records),
        "learn": math.fsum(record.seconds for record in later),
        "personalize": math.fsum(clients.seconds for clients in personalized),
    }
    rows = tuple(row for clients in personalized for row in clients.rows)
    clients = run.info.clients
    return Report(
        recipe=run.study.recipe,
        seed=run.study.seed,
        engine="flower" if run.external else run.study.engine,
        device=run.device.type,
        rows=rows,
        kinds=summarise_kinds(
            rows,
            {name: client.about for name, client in clients.items()},
            read_strategies(run.folder.path, clients),
        ),
        versions=versions(),
        seconds={**seconds, "total": math.fsum(seconds.values())},
        bytes_per_client_round={
            stage: _bytes_per_client(records) for stage, records in by_stage.items() if records
        },
        bytes_model=state_bytes(state_tensors(pretrained.model)),
        privacy=accounting.spent(
            [
                (method.name, _private_stages(run, method, pretrained, trained))
                for method, trained in zip(run.methods, learned, strict=True)
            ],
            given=run.given is not None,
            simulated=run.clients.simulated,
        ),
    )


def _private_stages(
    run: RunContext, method: Method, pretrained: GlobalModel, trained: TrainedState
) -> list[accounting.Stage]:
    """Return all stages that what a method has learned comes from."""
    stages = []
    spent = functools.partial(spending, names=run.population.seen, seed=run.study.seed)
    on_clients = pretrained.records and run.pretraining is None
    if on_clients and (method.trained_by_pretraining or method.starts_from == "pretrained"):
        rounds, travels = run.study.pretrain, bool(pretrained.state)
        stages.append(spent("pretrain", rounds, pretrained.records, travels=travels))
    for stage in dict.fromkeys(record.stage for record in trained.records):
        rounds, travels = _rounds_of(run.study, method), bool(trained.state)
        stages.append(spent(stage, rounds, trained.records, travels=travels))
    return stages


def _bytes_per_client(records: Sequence[RoundRecord]) -> dict[str, float]:
    """Return the mean over the training rounds, without the frozen model, which is sent once.

    When a client is sent the frozen model depends on what it was asked first, a baseline's
    personalization perhaps: that says nothing of the stage.
    """
    clients = sum(record.clients for record in records)
    return {
        "down": sum(record.bytes_down - record.bytes_model for record in records) / clients,
        "up": sum(record.bytes_up for record in records) / clients,
    }
