"""The rounds of a stage: draw clients, ask them, combine their answers, keep the best state.

A round's metrics judge the state that the clients received, so one more pass of messages after the
last round judges the last state.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.finetuning.stacking import resident
from fedl2p.data.population import Population
from fedl2p.federation import checkpoints
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower.client_directory import Answers, Frozen, Nodes, in_process
from fedl2p.federation.listeners import Listener
from fedl2p.federation.privacy.cohorts import draw_each
from fedl2p.federation.privacy.noise import PrivateMean
from fedl2p.federation.privacy.randomness import seeded, system
from fedl2p.federation.progress import Position, refuse_other_job
from fedl2p.federation.round_records import Federated, RoundRecord
from fedl2p.federation.server.aggregation import Aggregator
from fedl2p.federation.server.answer_checks import objection, one_line, overweight
from fedl2p.federation.server.replies import Reply
from fedl2p.federation.settings import Rounds
from fedl2p.method import Method, State
from fedl2p.seeds import derive_seed, generator
from fedl2p.version import __version__

log = logging.getLogger("fedl2p")

_MOST_SHUFFLED = 100_000
"""Clients among whom cohorts are drawn by a shuffle of all; of more, by position until enough."""


class FederationError(RuntimeError):
    """The rounds cannot go on: too many in a row brought too few good answers."""


def federate(
    method: Method,
    model: nn.Module,
    population: Population,
    *,
    rounds: Rounds,
    seed: int,
    stage: str,
    nodes: Nodes | None = None,
    listeners: Sequence[Listener] = (),
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Federated:
    """Run the federated rounds of one method.

    Parameters
    ----------
    method
        What travels and how clients train.
    model
        The frozen model (initial or pre-trained weights). It travels to each node that does not
        have it, once, and is only read.
    population
        The clients; only the seen ones take part.
    rounds
        How many rounds, with whom, and how answers are combined.
    seed
        The study's seed. The cohorts drawn depend on it and on the round only, so that all methods
        of a study meet the same clients.
    stage
        ``pretrain``, ``learn`` or the method's name: part of every client's seed, and the first
        column of the records.
    nodes
        Where the clients are; None for this process, all clients of a round in one call.
    listeners
        Told of the start, every round and the end.
    checkpoint
        Folder for this stage's checkpoints, one after every round; None for none.
    resume
        Continue from the newest checkpoint, bit for bit as if never stopped. A finished stage
        returns its result without a message. Without checkpoints it starts from the beginning.

    Returns
    -------
    Federated
        The state kept, and one record per round.

    Raises
    ------
    ValueError
        If the population is too small, a client has no node, or the checkpoints are of another
        run, all damaged, or there although ``resume`` is False.
    FederationError
        If ``rounds.give_up`` rounds in a row had too few good answers; resumable.
    """
    names = _seen(population)
    size = rounds.cohort(len(names))
    nodes = nodes or in_process(
        model, population, {method.name: method}, privacy={method.name: rounds.privacy}
    )
    from_seed = rounds.privacy.seeded(simulated=nodes.simulated)
    stage_run = _StageRun(
        method=method,
        model=Frozen.of(model),
        names=names,
        rounds=rounds,
        seed=seed,
        stage=stage,
        nodes=nodes,
        from_seed=from_seed,
        aggregator=Aggregator(
            rounds,
            buffers=[name for name, _ in model.named_buffers()],
            variances=_variances(model),
            private=PrivateMean(
                rounds.privacy,
                cohort=size,
                gaussian=lambda step: seeded(seed, stage, "privacy", step) if from_seed else system,
            )
            if rounds.privacy.central
            else None,
        ),
        folder=checkpoint,
    )
    resident(model).net.foresee(population.shape)
    position = (stage_run.resumed() if resume else None) or stage_run.started(model)
    for listener in listeners:
        listener.on_start(stage, rounds.rounds, position.records)
    try:
        while not position.finished:
            stage_run.advance(position)
            gave_up = position.dry >= rounds.give_up
            if gave_up:  # a resumed run tries as often again
                position.dry = 0
            stage_run.save(position)
            for listener in listeners:
                listener.on_round(position.records[-1])
            if gave_up:
                raise FederationError(stage_run.why_given_up(position))
    finally:
        for listener in listeners:
            listener.on_end(stage)
    return position.result(rounds)


def draw_cohort(names: Sequence[str], *, size: int, seed: int, round: int) -> list[str]:
    """Draw the clients of one round, without replacement, sorted by name.

    Parameters
    ----------
    names
        The seen clients in the population's order.
    size
        How many; 0 for all.
    seed, round
        The draw depends on nothing else.
    """
    if size == 0:
        return sorted(names)
    source = generator(seed, "cohort", round)
    if len(names) <= _MOST_SHUFFLED or 2 * size > len(names):
        order = torch.randperm(len(names), generator=source)
        return sorted(names[i] for i in order[:size].tolist())
    drawn: dict[int, None] = {}
    while len(drawn) < size:  # half of them are free at least
        more = torch.randint(len(names), (size,), generator=source).tolist()
        drawn |= dict.fromkeys(more)
    return sorted(names[i] for i in itertools.islice(drawn, size))


@dataclasses.dataclass(frozen=True)
class _StageRun:
    """What does not change during a stage, and the steps of its loop."""

    method: Method
    model: Frozen
    names: Sequence[str]
    rounds: Rounds
    seed: int
    stage: str
    nodes: Nodes
    aggregator: Aggregator
    folder: Path | None
    from_seed: bool = True

    @property
    def job(self) -> dict[str, Any]:
        """What identifies this stage in a checkpoint."""
        return {
            "version": __version__,
            "stage": self.stage,
            "method": self.method.name,
            "seed": self.seed,
            "rounds": dataclasses.asdict(self.rounds),
            "clients": list(self.names),
            "model": self.model.key,
        }

    def started(self, model: nn.Module) -> Position:
        if self.folder is not None and checkpoints.exist(self.folder):
            raise ValueError(
                f"{self.folder} holds checkpoints already; resume, or use another folder"
            )
        # A study may use the same nodes for several runs: nobody keeps anything of an earlier one.
        self.nodes.restore(self.method.name, {}, model=self.model)
        start_seed = derive_seed(self.seed, "start", self.method.name)
        state = self.method.start(model, seed=start_seed)
        state = {name: tensor.detach().cpu() for name, tensor in state.items()}
        return Position(state=state, finished=self.rounds.rounds == 0)

    def resumed(self) -> Position | None:
        saved = None if self.folder is None else checkpoints.load_newest(self.folder)
        if saved is None or self.folder is None:
            return None
        try:
            refuse_other_job(self.folder, saved.values["job"], self.job)
            position = Position.from_checkpoint(saved)
            kept = {name: saved.groups[f"kept {name}"] for name in saved.values["clients"]}
            has_model = [str(name) for name in saved.values["has_model"]]
            self.aggregator.remember(saved.groups["server"])
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            # Its hash is right, so it is as it was written: by something else than this.
            raise ValueError(
                f"the checkpoint in {self.folder} does not hold what a stage needs "
                f"({type(error).__name__}: {error}); remove that folder to start this stage again"
            ) from None
        self.nodes.restore(self.method.name, kept, model=self.model, has_model=has_model)
        return position

    def save(self, position: Position) -> None:
        """Write a checkpoint."""
        if self.folder is not None:
            saved = position.to_checkpoint(
                job=self.job,
                memory=self.aggregator.memory(),
                kept=self.nodes.kept(self.method.name),
                has_model=self.nodes.has_model(self.model.key),
            )
            checkpoints.save(self.folder, position.round, saved)

    def why_given_up(self, position: Position) -> str:
        """Return what led nowhere, in one line, with one client's reason."""
        reasons = sorted(position.records[-1].reasons.items())
        example = f" (client {reasons[0][0]}: {reasons[0][1]})" if reasons else ""
        return (
            f"{self.stage}: {self.rounds.give_up} rounds in a row brought no new state, for lack "
            f"of {self.rounds.fewest} or more good answers, the last one round "
            f"{position.round}{example}; failures.csv and the log name all clients and reasons"
        )

    def advance(self, position: Position) -> None:
        """Do one round, or the pass that judges the last state."""
        start = time.perf_counter()
        number = position.round + 1
        judging = number > self.rounds.rounds
        averaging = judging and self.rounds.keep == "average"
        cohort = self.cohort(number)
        answers = self.nodes.ask(
            wire.VALIDATE if judging else wire.TRAIN,
            {name: derive_seed(self.seed, self.stage, number, name) for name in cohort},
            method=self.method.name,
            stage=self.stage,
            round=number,
            state=position.result(self.rounds).state if averaging else position.state,
            model=self.model,
        )
        replies = _accept(
            answers,
            like=None if judging else position.state,
            rounds=self.rounds,
        )
        for name, reason in sorted(answers.failures.items()):
            log.warning("%s, round %d: client %s failed: %s", self.stage, number, name, reason)
        typical = _mean if self.rounds.robust == "none" else _median
        loss, accuracy = typical("loss", replies), typical("accuracy", replies)
        if not averaging:  # the loss of an average says nothing about the last state
            position.judge(loss, patience=0 if judging else self.rounds.patience)
        position.round = number
        if judging:
            position.finished = True
        elif not position.finished:
            self._combine(position, replies, asked=len(cohort))
        position.records.append(
            RoundRecord(
                stage=self.stage,
                round=number,
                clients=len(cohort),
                loss=loss,
                accuracy=accuracy,
                seconds=time.perf_counter() - start,
                bytes_down=answers.bytes_down,
                bytes_up=answers.bytes_up,
                failures=len(answers.failures),
                bytes_model=answers.bytes_model,
                reasons=dict(sorted(answers.failures.items())),
            )
        )

    def cohort(self, round: int) -> list[str]:
        """Return whom to ask in a round."""
        size = self.rounds.clients_per_round
        if not self.rounds.privacy.central:
            return draw_cohort(self.names, size=size, seed=self.seed, round=round)
        share = self.rounds.cohort(len(self.names)) / len(self.names)
        return draw_each(
            self.names, share=share, seed=self.seed, round=round, from_seed=self.from_seed
        )

    def _combine(self, position: Position, replies: Sequence[Reply], *, asked: int) -> None:
        """Make the next state of the replies, or keep the old one if they are too few.

        Under central privacy the state moves by noise at least: whether it moved must not tell who
        was there.
        """
        private = self.rounds.privacy.central
        enough = len(replies) >= self.rounds.fewest or (private and not asked)
        state, why = None, f"{len(replies)} good answers are too few"
        if enough or private:
            try:
                state = self.aggregator.combine(position.state, replies)
            except ArithmeticError as error:
                why, enough = str(error), False
        if state is not None:
            position.made(state, decay=self.rounds.average_decay)
        if state is not None and enough:
            position.dry = 0
        else:
            position.dry += 1
            what = "stays as it was" if state is None else "moves by noise"
            log.warning("%s, round %d: %s, the state %s", self.stage, position.round, why, what)
        # A method without a travelling state has nothing to judge after its last round.
        position.finished = position.round == self.rounds.rounds and not position.state


def _seen(population: Population) -> Sequence[str]:
    if not len(population.seen):
        raise ValueError("the population has no seen client, so nobody can take part in rounds")
    return population.seen


def _variances(model: nn.Module) -> list[str]:
    """Return the names of the model's running variances."""
    return [
        f"{name}.running_var".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]


def _accept(answers: Answers, *, like: State | None, rounds: Rounds) -> list[Reply]:
    """Turn good contents into replies sorted by client, and bad ones into failures.

    ``like`` is the state that was sent, or None where no tensors come back. Contents are taken out
    of the answers, so that a tensor is not held twice.
    """
    privacy = rounds.privacy
    accepted: list[Reply] = []
    for name in sorted(answers.contents):
        try:
            reply = _read(name, answers.contents.pop(name), like)
            # One that waits in a file is read as a whole, once, and let go.
            shared = dict(reply.shared)
            reason = objection(shared, like=like or {}, weight=reply.weight, metrics=reply.metrics)
            del shared
            if privacy.mechanism == "local" and reply.metrics:
                reason = "its answer has metrics, so it was not made under local privacy"
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"its answer cannot be read: {error}"
        if reason is None:
            accepted.append(reply)
        else:
            answers.failures[name] = one_line(reason)
    if privacy.central or rounds.robust != "none":  # no weight counts, so none can be too large
        return accepted
    heavy = overweight({r.client: r.weight for r in accepted}, limit=rounds.weight_limit)
    answers.failures |= heavy
    return [reply for reply in accepted if reply.client not in heavy]


def _read(name: str, content: RecordDict, like: State | None) -> Reply:
    metrics: Mapping[str, Any] = wire.record_of(content, wire.METRICS, MetricRecord)
    numbers = {key: float(value) for key, value in metrics.items()}
    shared: Mapping[str, Tensor] = {}
    if like is not None:
        shared = wire.state_of(wire.record_of(content, wire.ARRAYS, ArrayRecord))
    if wire.WEIGHT not in numbers:
        raise ValueError(f"it has no {wire.WEIGHT!r}")
    return Reply(name, shared, numbers.pop(wire.WEIGHT), numbers)


def _mean(metric: str, replies: Sequence[Reply]) -> float:
    """Return the weighted mean of a metric over the replies that have it; NaN if none has."""
    pairs = [(r.weight, r.metrics[metric]) for r in replies if metric in r.metrics]
    total = sum(weight for weight, _ in pairs)
    return sum(weight * value for weight, value in pairs) / total if pairs else nan


def _median(metric: str, replies: Sequence[Reply]) -> float:
    """Return the median of a metric over the replies that have it, whatever their weights.

    A client may state any loss; the choice of the best round must not be its own.
    """
    values = [r.metrics[metric] for r in replies if metric in r.metrics]
    return median(values) if values else nan
