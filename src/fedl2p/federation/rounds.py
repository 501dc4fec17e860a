"""The rounds of a stage: draw clients, ask them, combine their answers, keep the best state.

A round's metrics judge the state that the clients received, so one more pass after the last round
judges the last state.
"""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.working_copies import working_copies
from fedl2p.data.population import Population
from fedl2p.federation import progress as checkpoints
from fedl2p.federation.clients.in_process import in_process
from fedl2p.federation.listeners import Listener
from fedl2p.federation.messages import Clients, FederationError, FrozenModel, Question
from fedl2p.federation.privacy import accounting
from fedl2p.federation.privacy.noise import Gaussian, PrivateMean, seeded, system
from fedl2p.federation.progress import Progress, refuse_other_job
from fedl2p.federation.round_records import Federated, RoundRecord
from fedl2p.federation.sampling import draw_cohort, draw_independently
from fedl2p.federation.server.aggregation import (
    Mean,
    Rule,
    RuleOfAll,
    ServerOptimizer,
    WeightedMean,
    norm_clipping,
)
from fedl2p.federation.server.tally import Tally
from fedl2p.federation.settings import Rounds
from fedl2p.method import Method, State
from fedl2p.runs import layout
from fedl2p.seeds import derive_seed
from fedl2p.version import __version__

log = logging.getLogger("fedl2p")


@torch.inference_mode(False)
@torch.enable_grad()
def federate(
    method: Method,
    model: nn.Module,
    population: Population,
    *,
    rounds: Rounds,
    seed: int,
    stage: str,
    clients: Clients | None = None,
    listeners: Sequence[Listener] = (),
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Federated:
    """Run the federated rounds of one method. Gradients are on in here, whatever the caller has.

    Parameters
    ----------
    method
        What travels and how clients train.
    model
        The frozen model (initial or pre-trained weights). It travels to each client that does not
        have it, once, and is only read.
    population
        The clients; only the seen ones take part.
    rounds
        How many rounds, with whom, and how answers are combined.
    seed
        The study's seed. The cohorts drawn depend on it and on the round only, so that all methods
        of a study have the same clients in a round.
    stage
        ``pretrain``, ``learn`` or the method's name: part of every client's seed, and the first
        column of the records.
    clients
        Where the clients are; None for this process.
    listeners
        Called at the start, after every round and at the end.
    checkpoint
        Folder for this stage's checkpoints, one after every round; None for none.
    resume
        Continue from the newest checkpoint, bit for bit as if never stopped. A finished stage
        returns its result without a question. Without checkpoints it starts from the beginning.

    Returns
    -------
    Federated
        The state kept, and one record per round.

    Raises
    ------
    ValueError
        If the population is too small, a client does not exist, the robust rule needs Flower and it
        is not installed, or the checkpoints are of another run, all damaged, or there although
        ``resume`` is False.
    FederationError
        If ``rounds.give_up`` rounds in a row had too few good answers; resumable. If no round
        brought a new state. If, on this machine, all clients of the first round fail in the same
        way: then it is the model or the data, and further rounds would fail too.
    """
    if not len(names := population.seen):
        raise ValueError("the population has no seen client, so nobody can take part in rounds")
    size, privacy = rounds.cohort(len(names)), rounds.privacy
    if clients is None:
        clients = in_process(
            model, population, {method.name: method}, privacy={method.name: privacy}
        )
    from_seed = privacy.seeded(simulated=clients.simulated)
    frozen = FrozenModel.of(model)
    optimizer = ServerOptimizer(
        rounds,
        buffers=[name for name, _ in model.named_buffers()],
        variances=_variances(model),
    )
    cohort_of, new_mean = _cohorts(rounds, names, seed, from_seed), mean_of(rounds, size)
    job = _job(stage, method, seed, rounds, names, frozen)
    progress = None
    if checkpoint is not None and resume:
        progress = _resumed(checkpoint, job, optimizer, clients)
    elif checkpoint is not None and checkpoints.exist(checkpoint):
        raise ValueError(f"{checkpoint} holds checkpoints already; resume, or use another folder")
    if progress is None:
        # A study may use the same clients for several runs: they keep nothing of an earlier one.
        clients.restore(method.name, {})
        working_copies(model).net.foresee(population.shape)
        state = method.start(model, seed=derive_seed(seed, "start", method.name))
        state = {name: tensor.detach().cpu() for name, tensor in state.items()}
        progress = Progress(state=state, finished=rounds.rounds == 0)
    for listener in listeners:
        listener.on_start(stage, rounds.rounds, progress.records)
    try:
        while not progress.finished:
            began = time.perf_counter()
            progress.round += 1
            judging = progress.round > rounds.rounds
            averaging = judging and rounds.keep == "average"
            question = Question(
                action="validate" if judging else "train",
                method=method.name,
                stage=stage,
                round=progress.round,
                state=progress.result(rounds).state if averaging else progress.state,
                model=frozen,
                seeds={
                    name: derive_seed(seed, stage, progress.round, name)
                    for name in cohort_of(progress.round)
                },
            )
            draw = seeded(seed, stage, "privacy", optimizer.steps) if from_seed else system
            tally = Tally(
                question,
                rounds,
                None if judging else new_mean(progress.state, draw),
                trusted=clients.simulated,
            )
            for answer in clients.ask(question):
                tally.add(answer)
            tally.close()
            if progress.round == 1 and clients.simulated:
                refuse_common_failure(stage, tally.failures, asked=tally.asked)
            if not averaging:  # the loss of an average says nothing about the last state
                progress.judge(tally.loss, patience=0 if judging else rounds.patience)
            if judging:
                progress.finished = True
            elif not progress.finished:
                _combine(progress, tally, optimizer, rounds)
            progress.records.append(tally.record(seconds=time.perf_counter() - began))
            gave_up = progress.dry >= rounds.give_up
            if gave_up:  # a resumed run tries as often again
                progress.dry = 0
            if checkpoint is not None:
                saved = progress.to_checkpoint(
                    job=job,
                    optimizer=optimizer.memory,
                    kept=clients.kept(method.name),
                    has_model=clients.has_model(frozen.key),
                )
                checkpoints.save(checkpoint, progress.round, saved)
            for listener in listeners:
                listener.on_round(progress.records[-1])
            if gave_up:
                raise FederationError(_why_given_up(progress.records[-1], rounds))
        if rounds.rounds and not optimizer.steps:
            raise FederationError(_why_nothing_came(progress.records))
    finally:
        for listener in listeners:
            listener.on_end(stage)
    return progress.result(rounds)


def refuse_common_failure(stage: str, failures: Mapping[str, str], *, asked: int) -> None:
    """Raise if every client that was asked failed for the same reason.

    Only errors that the next round must meet again count: not those of a disk or a connection
    (OSError), nor values that are not finite.

    Raises
    ------
    FederationError
        With that reason, and the name of the first client.
    """
    if asked and len(failures) == asked and len(set(failures.values())) == 1:
        client, reason = min(failures.items())
        kind = getattr(builtins, reason.partition(":")[0], None)
        if not isinstance(kind, type) or issubclass(kind, (OSError, ArithmeticError)):
            return
        others = "" if asked == 1 else f", and all {asked} clients fail in the same way"
        raise FederationError(
            f"{stage}: client {client!r} failed{others}: {reason}; mend the model or the data"
        )


def _why_nothing_came(records: Sequence[RoundRecord]) -> str:
    """Return in one line that no round of a stage brought a new state, with one client's reason."""
    reasons = [item for record in records for item in sorted(record.reasons.items())]
    example = f", e.g. client {reasons[0][0]!r}: {reasons[0][1]}" if reasons else ""
    return f"{records[0].stage}: no round brought a new state, so nothing was learned{example}"


def spending(
    stage: str,
    rounds: Rounds,
    records: Sequence[RoundRecord],
    *,
    names: Sequence[str],
    seed: int,
    travels: bool,
) -> accounting.Stage:
    """Return what privacy accounting needs to know of a stage that is over.

    Parameters
    ----------
    stage
        As in the records; a last round more than ``rounds`` only judges and is not counted.
    names
        The seen clients.
    seed
        The study's.
    travels
        Whether any tensor came back from clients.
    """
    count = sum(r.stage == stage and r.round <= rounds.rounds for r in records)
    if rounds.privacy.mechanism == "local":
        size = rounds.clients_per_round
        drawn = [draw_cohort(names, size=size, seed=seed, round=r + 1) for r in range(count)]
        count = accounting.most_asked(drawn)
    return accounting.Stage(
        name=stage,
        privacy=rounds.privacy,
        cohort=rounds.cohort(len(names)),
        population=len(names),
        count=count,
        travels=travels,
    )


def _cohorts(
    rounds: Rounds, names: Sequence[str], seed: int, from_seed: bool
) -> Callable[[int], list[str]]:
    """Return what draws the clients of a round, sorted, from its number."""
    if not rounds.privacy.central:
        size = rounds.clients_per_round
        return lambda round: draw_cohort(names, size=size, seed=seed, round=round)
    share = rounds.cohort(len(names)) / len(names)
    return lambda round: draw_independently(
        names, share=share, seed=seed, round=round, from_seed=from_seed
    )


def mean_of(rounds: Rounds, size: int) -> Callable[[State, Gaussian], Mean]:
    """Return what makes a round's mean, from the state that is sent and a source of noise."""
    privacy = rounds.privacy
    if privacy.central:
        return lambda state, draw: PrivateMean(
            state, bound=privacy.clip, clients=size, noise=privacy.noise, draw=draw
        )
    if rounds.robust != "none":
        rule = norm_clipping(rounds) if rounds.robust == "normclipping" else _flowers_rule(rounds)
        return lambda state, draw: RuleOfAll(state, rule)
    return lambda state, draw: WeightedMean(state, clip_norm=rounds.clip_norm)


def _flowers_rule(rounds: Rounds) -> Rule:
    try:
        from fedl2p.federation.flower.robust import robust_rule
    except ModuleNotFoundError as error:
        raise ValueError(
            f"robust is {rounds.robust!r}, which needs {error.name}, and that is not installed; "
            "run pip install 'fedl2p[flower]', or use 'normclipping'"
        ) from None
    return robust_rule(rounds)


def _combine(progress: Progress, tally: Tally, optimizer: ServerOptimizer, rounds: Rounds) -> None:
    """Make the next state of the answers, or keep the old one if they are too few.

    Under central privacy the state moves by noise at least: whether it moved must not tell who took
    part.
    """
    private = rounds.privacy.central
    enough = tally.good >= rounds.fewest or (private and not tally.asked)
    state, why = None, f"{tally.good} good answers are too few"
    if enough or private:
        assert tally.mean is not None
        try:
            mean = tally.mean.result()
            state = None if mean is None else optimizer.step(progress.state, mean)
        except ArithmeticError as error:
            why, enough = str(error), False
    if state is not None:
        progress.advance(state, decay=rounds.average_decay)
    if state is not None and enough:
        progress.dry = 0
    else:
        progress.dry += 1
        what = "stays as it was" if state is None else "moves by noise"
        log.warning("%s, round %d: %s, the state %s", tally.stage, progress.round, why, what)
    # A method without a travelling state has nothing to judge after its last round.
    progress.finished = progress.round == rounds.rounds and not progress.state


def _job(
    stage: str, method: Method, seed: int, rounds: Rounds, names: Sequence[str], model: FrozenModel
) -> dict[str, Any]:
    """Return what identifies a stage in its checkpoints."""
    clients = hashlib.blake2b(digest_size=16)
    for name in names:  # there may be a million
        clients.update(f"{name}\0".encode())
    return {
        "version": __version__,
        "stage": stage,
        "method": method.name,
        "seed": seed,
        "rounds": dataclasses.asdict(rounds),
        "clients": clients.hexdigest(),
        "model": model.key,
    }


def _resumed(
    folder: Path, job: dict[str, Any], optimizer: ServerOptimizer, clients: Clients
) -> Progress | None:
    """Return the progress of the newest checkpoint, with optimizer and clients as they were."""
    saved = checkpoints.load_newest(folder)
    if saved is None:
        return None
    try:
        refuse_other_job(folder, saved.values["job"], job)
        progress = Progress.from_checkpoint(saved)
        kept = {name: saved.groups[f"kept {name}"] for name in saved.values["clients"]}
        has_model = saved.values["has_model"]
        has_model = None if has_model is None else [str(name) for name in has_model]
        optimizer.memory = {"steps": saved.groups["server"]["steps"], **saved.groups["server"]}
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        # Its hash is right, so it is as it was written: by something else than this.
        raise ValueError(
            f"the checkpoint in {folder} does not hold what a stage needs "
            f"({type(error).__name__}: {error}); remove that folder to start this stage again"
        ) from None
    clients.restore(job["method"], kept)
    clients.set_has_model(job["model"], has_model)
    return progress


def _why_given_up(record: RoundRecord, rounds: Rounds) -> str:
    """Return why the rounds cannot go on, in one line, with one client's reason."""
    reasons = sorted(record.reasons.items())
    example = f" (client {reasons[0][0]}: {reasons[0][1]})" if reasons else ""
    return (
        f"{record.stage}: {rounds.give_up} rounds in a row brought no new state, for lack of "
        f"{rounds.fewest} or more good answers, the last one round {record.round}{example}; "
        f"{layout.FAILURES} and the log name all clients and reasons"
    )


def _variances(model: nn.Module) -> list[str]:
    """Return the names of the model's running variances."""
    return [
        f"{name}.running_var".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
