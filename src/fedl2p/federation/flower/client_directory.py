"""The server's side of the wire: which node is which client, and one question to many of them."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedl2p.data.population import Population
from fedl2p.federation.clients.in_process import InProcessGrid
from fedl2p.federation.clients.local_grid import LocalGrid
from fedl2p.federation.clients.node import Handler
from fedl2p.federation.flower import records, shared_nodes
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.server.answer_checks import one_line
from fedl2p.method import Method, State

log = logging.getLogger("fedl2p")


@dataclass(frozen=True)
class Frozen:
    """A model's weights that do not change for a whole stage, and their content hash."""

    weights: State
    key: str

    @classmethod
    def of(cls, model: nn.Module) -> Frozen:
        """Take the weights of a model."""
        weights = dict(model.state_dict())
        return cls(weights, records.content_hash(weights))


@dataclass
class Answers:
    """What came back for one question.

    Parameters
    ----------
    contents
        Reply by client, for the clients that answered.
    failures
        Reason by client, for the others.
    bytes_down, bytes_up
        Bytes of all messages to and from the clients.
    bytes_model
        The part of ``bytes_down`` that is the frozen model, sent to clients that lacked it.
    """

    contents: dict[str, RecordDict] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_model: int = 0


@dataclass
class _Met:
    """What nodes have said of themselves: ids and models by client; models of shared nodes."""

    ids: dict[str, int] = field(default_factory=dict)
    have: dict[str, set[str]] = field(default_factory=dict)
    shared: dict[int, set[str]] = field(default_factory=dict)

    @property
    def common(self) -> set[str]:
        """The models of the first that answered, which speaks for all nodes in this process."""
        return next(iter(self.have.values()), set())


class Nodes:
    """The nodes of a Flower grid by client name, and what each is known to have.

    Keep one for a whole study: it remembers which node has which global model, so that a model
    travels to each node once.

    Parameters
    ----------
    grid
        Any Flower grid: :class:`~fedl2p.federation.clients.in_process.InProcessGrid`,
        :class:`~fedl2p.federation.clients.ray.RayGrid`, or the one that a ServerApp gets.
    timeout
        Seconds to wait for the replies to one question; None to wait for all. A client without a
        reply by then has failed in that round. Clients in this process cannot be given up: there
        is nothing that could stop their code, and a slow machine must not change a result.

    Raises
    ------
    ValueError
        If ``timeout`` is not above 0.

    Notes
    -----
    In this process and on Ray the tensors of replies beyond 256 MiB wait in a file until the mean
    is made. From a SuperLink, Flower's grid hands over all replies of a question at once, so that
    memory must hold them.
    """

    def __init__(self, grid: Grid, *, timeout: float | None = None) -> None:
        if timeout is not None and not 0 < timeout < inf:
            raise ValueError(f"timeout is {timeout}, but must be above 0 seconds, or None")
        self.grid = grid
        self.timeout = timeout
        self._ids: dict[str, int] = {}
        self._shared: dict[int, set[str]] = {}
        # Where all clients are in this process, their nodes follow from their names, and what all
        # have from the start is noted once: nothing here grows with the clients nobody asks.
        self._have: dict[str, set[str]] = {}
        self._common: set[str] | None = None

    @property
    def _local(self) -> LocalGrid | None:
        return self.grid if isinstance(self.grid, LocalGrid) else None

    @property
    def simulated(self) -> bool:
        """Whether all clients are in this process."""
        return self._local is not None

    @property
    def _live(self) -> bool:
        return self._local is not None and self._local.live

    def close(self) -> None:
        """Give back what a grid of this process holds; one that came from a ServerApp is left."""
        if self._local is not None:
            self._local.close()

    def meet(self) -> tuple[str, ...]:
        """Ask every node who it is and which models it has; return the client names, sorted.

        It is not needed where all clients are in this process: there one node speaks for all, when
        the first question is asked.

        Raises
        ------
        ValueError
            If two nodes say that they are the same client.
        """
        met = self._introductions(self.grid.get_node_ids())
        if self._local is None:
            self._ids, self._shared = met.ids, met.shared
            self._have |= met.have
        else:
            self._common, self._have = met.common, {}
        return tuple(sorted(met.ids))

    def _greet(self) -> None:
        """Learn from one node in this process which models all of them have from the start."""
        if self._local is not None and self._common is None:
            first = itertools.islice(self._local.get_node_ids(), 1)
            self._common = self._introductions(first).common

    def _introductions(self, nodes: Iterable[int]) -> _Met:
        asked = [Message(RecordDict(), node, records.QUERY, group_id="query") for node in nodes]
        met = _Met()
        for reply in self.grid.send_and_receive(asked, timeout=self.timeout):
            if reply.has_error():
                log.warning("node %d: %s", reply.metadata.src_node_id, one_line(_reason(reply)))
                continue
            node = reply.metadata.src_node_id
            try:
                said = records.record_of(reply.content, records.CONFIG, ConfigRecord)
                models = records.strings(said, "models")
                several = "clients" in said
                names = records.strings(said, "clients") if several else [str(said["client"])]
            except (KeyError, ValueError) as error:
                log.warning("node %d does not say who it is: %s", node, one_line(str(error)))
                continue
            if several:
                met.shared[node] = set(models)
            for name in names:
                if name in met.ids:
                    raise ValueError(
                        f"two nodes say that they are client {name!r}; give each node its own "
                        "client"
                    )
                met.ids[name] = node
                met.have[name] = set(models)
        return met

    def ask(
        self,
        action: str,
        seeds: Mapping[str, int],
        *,
        method: str,
        stage: str,
        round: int,
        state: State,
        model: Frozen,
    ) -> Answers:
        """Ask many clients the same and wait for the answers.

        Parameters
        ----------
        action
            A message type of :mod:`~fedl2p.federation.flower.records`.
        seeds
            Seed by client name, for the clients to ask; the order is that of the messages.
        method, stage, round
            What to do.
        state
            Travels with every message.
        model
            Travels to the nodes that do not have it.

        Raises
        ------
        ValueError
            If no node is one of the clients.
        """
        ids = self._find(list(seeds))
        job: dict[str, str | int] = {
            "method": method,
            "stage": stage,
            "round": round,
            "model": model.key,
        }
        content = RecordDict({records.ARRAYS: records.to_record(state, live=self._live)})
        answers = Answers()
        unknown = self._exchange(action, seeds, ids, job, content, model, answers)
        if unknown:
            # A node may have forgotten a model (a new process); it says so and is sent it again.
            for name in unknown:
                self._note(name, model.key, has=False)
            again = {name: seeds[name] for name in unknown}
            for name in self._exchange(action, again, ids, job, content, model, answers):
                answers.failures[name] = f"does not accept the weights of model {model.key}"
        answers.failures = {name: one_line(why) for name, why in answers.failures.items()}
        for name in seeds:
            if name not in answers.contents:
                within = "" if self.timeout is None else f" within {self.timeout:g} s"
                answers.failures.setdefault(name, f"no answer{within}")
        return answers

    def has_model(self, key: str) -> tuple[str, ...]:
        """Return the clients whose nodes have been sent a model, sorted."""
        everybody = self._local is not None and key in (self._common or ())
        names = self._local.names if self._local is not None and everybody else self._have
        return tuple(sorted(name for name in names if self._has(name, key)))

    def _has(self, name: str, key: str) -> bool:
        return key in self._have.get(name, self._common or ())

    def _note(self, name: str, key: str, *, has: bool) -> None:
        own = self._have.get(name, self._common or set())
        if (key in own) != has:
            self._have[name] = own ^ {key}

    def note_sent(self, model: nn.Module, names: Sequence[str]) -> None:
        """Take note that clients have been sent a model already.

        For a resumed study that skips a finished part: without it the bytes of later rounds would
        count the model's journey a second time. Nodes elsewhere say themselves what they have.
        """
        if self._local is None:
            return
        self._greet()
        key = self._local.remember(dict(model.state_dict()))
        for name in names:
            self._note(name, key, has=True)

    def kept(self, method: str) -> dict[str, State]:
        """Return what the clients in this process keep; nodes elsewhere keep it to themselves."""
        return {} if self._local is None else self._local.kept(method)

    def restore(
        self,
        method: str,
        kept: Mapping[str, State],
        *,
        model: Frozen,
        has_model: Sequence[str] | None = None,
    ) -> None:
        """Put the clients in this process where a checkpoint says they were.

        Nodes elsewhere are left alone: they say themselves what they have.

        Parameters
        ----------
        method
            Whose kept tensors are set.
        kept
            What each client keeps; one that is not named keeps nothing.
        model
            The frozen model.
        has_model
            The clients that have been sent it, and no others; None to leave that as it is.
        """
        if self._local is None:
            return
        self._greet()
        self._local.restore(method, kept)
        if has_model is None:
            return
        self._local.remember(model.weights)
        listed = set(has_model)
        for name in self._local.names:
            self._note(name, model.key, has=name in listed)

    def _node(self, name: str) -> int | None:
        return self._ids.get(name) if self._local is None else self._local.node_of(name)

    def _find(self, names: Sequence[str]) -> dict[str, int]:
        """Return the nodes of clients."""
        self._greet()
        if self._local is None and any(name not in self._ids for name in names):
            self.meet()
        found = {name: node for name in names if (node := self._node(name)) is not None}
        absent = [name for name in names if name not in found]
        if absent:
            count = len(self._ids if self._local is None else self._local.names)
            raise ValueError(
                f"no node is client {absent[0]!r} ({len(absent)} of {len(names)} are missing); "
                f"{count} nodes answered"
            )
        return found

    def _exchange(
        self,
        action: str,
        seeds: Mapping[str, int],
        ids: Mapping[str, int],
        job: Mapping[str, str | int],
        content: RecordDict,
        model: Frozen,
        answers: Answers,
    ) -> list[str]:
        """Send once and sort the replies; return the clients that lack the model."""
        messages: dict[str, Message] = {}
        weights = None
        # One group is one state: the in-process grid makes cohorts of it.
        group = f"{job['stage']}.{job['round']}"
        for name, seed in seeds.items():
            own = RecordDict({**content, records.CONFIG: ConfigRecord({**job, "seed": seed})})
            if not self._has(name, model.key):
                weights = weights or records.to_record(model.weights, live=self._live)
                own[records.MODEL] = weights
                self._note(name, model.key, has=True)
                answers.bytes_model += records.count_bytes(RecordDict({records.MODEL: weights}))
            answers.bytes_down += records.count_bytes(own)
            messages[name] = Message(own, ids[name], action, group_id=group)
        unknown = []
        replies = shared_nodes.exchange(
            self.grid, messages, shared=self._shared, timeout=self.timeout
        )
        for name, reply in replies:
            if isinstance(reply, RecordDict):
                answers.contents[name] = reply
                answers.bytes_up += records.count_bytes(reply)
            elif reply.code == records.MODEL_UNKNOWN:
                unknown.append(name)
            else:
                answers.failures[name] = reply.reason or f"error {reply.code}"
        return unknown


def _reason(reply: Message) -> str:
    return reply.error.reason or f"error {reply.error.code}"


def model_bytes(model: nn.Module) -> int:
    """Return the bytes that a model adds to the message that brings it to a node."""
    record = records.to_record(dict(model.state_dict()), live=True)
    return records.count_bytes(RecordDict({records.MODEL: record}))


def in_process(
    model: nn.Module,
    population: Population,
    methods: Mapping[str, Method],
    *,
    cohort: int = 0,
    device: torch.device | str = "cpu",
    privacy: Mapping[str, Privacy] | None = None,
) -> Nodes:
    """Return nodes in this process, one per client, that have ``model`` from the start.

    Parameters
    ----------
    model
        Copied, so that the caller's model stays as it is.
    population
        The clients.
    methods
        Methods by name.
    cohort
        Most clients per call of a method; 0 for no limit.
    device
        Where clients compute.
    privacy
        What clients do to their updates before they leave them, by method.
    """
    handler = Handler(
        build=lambda: copy.deepcopy(model),
        population=population,
        methods=methods,
        device=device,
        privacy=privacy,
        simulated=True,
    )
    return Nodes(InProcessGrid(handler, cohort=cohort))
