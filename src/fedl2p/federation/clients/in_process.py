"""Clients in this process: one node answers for all of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from fedl2p.core.functional.copies import duplicate
from fedl2p.data.population import Population
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.messages import (
    Answer,
    Question,
    answer_bytes,
    question_bytes,
    state_bytes,
)
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.method import Method, State


class LocalClients:
    """What the clients of a population on this machine keep, and which models they have.

    A client costs nothing before it is asked.

    Parameters
    ----------
    names
        The clients, in the order of the population.
    initial
        Content hash of the model that all have from the start; None for none.

    Raises
    ------
    ValueError
        If a name occurs twice.
    """

    simulated = True

    def __init__(self, names: Sequence[str], *, initial: str | None) -> None:
        if isinstance(names, tuple | list):
            if len(set(names)) < len(names):
                twice, _ = Counter(names).most_common(1)[0]
                raise ValueError(f"two clients are called {twice!r}; give each a name of its own")
            self._names: Sequence[str] | frozenset[str] = frozenset(names)
        else:  # made when asked for; the sequence knows its own names
            self._names = names
        self._kept: dict[str, dict[str, State]] = {}
        # By content hash: the clients that have the model; None for all.
        self._has_model: dict[str, set[str] | None] = {} if initial is None else {initial: None}

    def kept(self, method: str) -> dict[str, State]:
        """Return what each client keeps for a method, for those that keep something, by name."""
        return {name: state for name, state in sorted(self._kept.get(method, {}).items()) if state}

    def restore(self, method: str, kept: Mapping[str, State]) -> None:
        """Set what the clients keep for a method; a client that is not named keeps nothing."""
        self._kept[method] = dict(kept)

    def has_model(self, key: str) -> list[str] | None:
        """Return the clients that have a model, sorted; None for all."""
        names = self._has_model.get(key, set())
        return None if names is None or len(names) == len(self._names) else sorted(names)

    def set_has_model(self, key: str, names: Sequence[str] | None) -> None:
        """Set which clients have a model; None for all."""
        self._has_model[key] = None if names is None else set(names)

    def close(self) -> None:
        """Do nothing: nothing was started."""

    def _send(self, question: Question) -> dict[str, Answer]:
        """Note that a question goes out; return an answer per client that holds its bytes only."""
        absent = [name for name in question.seeds if name not in self._names]
        if absent:
            raise ValueError(
                f"there is no client {absent[0]!r} ({len(absent)} of {len(question.seeds)} are "
                f"missing); there are {len(self._names)} clients"
            )
        has = self._has_model.setdefault(question.model.key, set())
        new = set() if has is None else {name for name in question.seeds if name not in has}
        if has is not None:
            has |= new
        assert question.model.weights is not None
        size = question_bytes(question)
        model = state_bytes(question.model.weights) if new else 0
        return {
            name: Answer(
                client=name,
                bytes_down=size + (model if name in new else 0),
                bytes_model=model if name in new else 0,
            )
            for name in question.seeds
        }


class InProcess(LocalClients):
    """The clients of a population, all answered by one node in this process.

    A question goes to the node as a whole, so that stacks of clients run side by side. A call in
    this process cannot be given up, so there are no timeouts.

    Parameters
    ----------
    node
        Answers; its population says which clients there are.
    """

    def __init__(self, node: ClientNode) -> None:
        super().__init__(node.population.names, initial=node.initial)
        self.node = node

    def ask(self, question: Question) -> Iterator[Answer]:
        """Yield one answer per client, in the order of the question."""
        sent = self._send(question)
        kept = self._kept.setdefault(question.method, {})
        for answer in self.node.answer(question, kept):
            yield with_bytes(answer, sent[answer.client])


def with_bytes(answer: Answer, sent: Answer) -> Answer:
    """Return an answer with the sizes that its messages would have."""
    return dataclasses.replace(
        answer,
        bytes_down=sent.bytes_down,
        bytes_model=sent.bytes_model,
        bytes_up=answer_bytes(answer),
    )


def in_process(
    model: nn.Module,
    population: Population,
    methods: Mapping[str, Method],
    *,
    device: torch.device | str = "cpu",
    privacy: Mapping[str, Privacy] | None = None,
) -> InProcess:
    """Return the clients of a population in this process; all have ``model`` from the start.

    Parameters
    ----------
    model
        Copied, so that the caller's model stays as it is.
    population
        The clients.
    methods
        Methods by name.
    device
        Where clients compute.
    privacy
        What clients do to their updates before they leave them, by method.
    """
    return InProcess(
        ClientNode(
            build=lambda: duplicate(model),
            population=population,
            methods=methods,
            device=device,
            privacy=privacy,
            simulated=True,
        )
    )
