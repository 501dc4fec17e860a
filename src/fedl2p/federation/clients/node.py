"""One node: it answers for the clients whose data it can open, on every engine alike."""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from math import nan
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fedl2p.core.clientdata import ClientData
from fedl2p.core.data_check import check_client
from fedl2p.core.functional.precision import compute_of
from fedl2p.core.functional.state_tensors import load_state_tensors, on_cpu, state_tensors
from fedl2p.core.working_copies import working_copies
from fedl2p.data.pools.client_cache import KEEP_BYTES, ClientCache, size_of
from fedl2p.data.population import Population
from fedl2p.federation.clients.received_models import ReceivedModels
from fedl2p.federation.messages import Answer, Question, UnknownModelError, one_line
from fedl2p.federation.privacy.noise import privatised, seeded, system
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.server.answer_checks import not_finite, objection
from fedl2p.method import Client, Method, Outcome, State, Update

log = logging.getLogger("fedl2p")

KEEP_BYTES_GPU = 4 << 30

T = TypeVar("T", Update, Outcome)

OnPersonalized = Callable[[str, nn.Module, State, Outcome], None]
"""``on_personalized(method, model, state, outcome)``: called for each personalized client."""


class ClientNode:
    """Answers questions for clients that live in this process.

    Parameters
    ----------
    build
        Returns the model; called once. Its weights are those that every node has from the start;
        others arrive with a question, once, and are then known by their content hash.
    population
        Opens the data of the clients.
    methods
        Methods by name.
    device
        Where the models, states and data are.
    models
        Folder for the global models that arrive; None to remember them in this process alone.
    on_personalized
        Called with the method's name, the global model, the state and the outcome of a personalized
        client, with its hyperparameters and profile; None where nobody needs them.
    wants_models
        Whether that outcome holds the personalized model too.
    keep_bytes
        Most bytes of clients' data that stay in memory between calls, and that one call of a
        method is given with the states that come back, but for a single larger stack; None for
        128 MiB, on a GPU 4 GiB.
    privacy
        What local privacy a method's updates get before they leave, by method name; the node's own
        settings, so that no question can switch it off. A method that is not named gets none.
    simulated
        True if all clients are on one machine and local noise may come from the study's seed.

    Attributes
    ----------
    initial
        Content hash of the weights that ``build`` gives.
    stack_size
        Most clients that are computed together; every call of a method holds whole stacks.
    """

    def __init__(
        self,
        *,
        build: Callable[[], nn.Module],
        population: Population,
        methods: Mapping[str, Method],
        device: torch.device | str = "cpu",
        models: Path | None = None,
        on_personalized: OnPersonalized | None = None,
        wants_models: bool = False,
        keep_bytes: int | None = None,
        privacy: Mapping[str, Privacy] | None = None,
        simulated: bool = False,
    ) -> None:
        self._local = {k: p for k, p in (privacy or {}).items() if p.mechanism == "local"}
        self._simulated = simulated
        self.population = population
        self.methods = dict(methods)
        self._on_personalized, self._wants_models = on_personalized, wants_models
        self.device = torch.device(device)
        self.model = build().to(self.device)
        self.stack_size = compute_of(self.model).stack_size
        self.models = ReceivedModels(models)
        self.initial = self.models.add(state_tensors(self.model), lasting=False)
        self._loaded = self.initial
        usual = KEEP_BYTES if self.device.type == "cpu" else KEEP_BYTES_GPU
        self._keep_bytes = usual if keep_bytes is None else keep_bytes
        self._open = ClientCache(self._checked, keep_bytes=self._keep_bytes)

    def answer(self, question: Question, kept: MutableMapping[str, State]) -> Iterator[Answer]:
        """Yield one answer per client of a question, in its order.

        The clients are cut by their position into stacks of ``stack_size``. As many whole stacks as
        memory allows go into one call of the method. Where a call fails, each of its stacks is
        tried by itself, and then each of its clients, so that only the culprits fail.

        Parameters
        ----------
        question
            What to do, and for whom.
        kept
            What the clients keep for the method, by name; updated with their new tensors.

        Raises
        ------
        UnknownModelError
            If the frozen model is not here and does not come along.
        """
        if question.method not in self.methods:
            known = ", ".join(self.methods)
            for name in question.seeds:
                reason = f"method {question.method!r} is not here; there are {known}"
                yield self._failed(question, name, reason)
            return
        method, model = self.methods[question.method], self._load(question)
        state = {name: tensor.to(self.device) for name, tensor in question.state.items()}
        for portion in self._portions(question):
            calls = [portion]
            while calls:
                names = calls.pop()
                try:
                    clients = [self._client(question, name, kept) for name in names]
                    answers: list[Answer]
                    match question.action:
                        case "train":
                            updates = _in_order(clients, method.train(model, state, clients))
                            answers = [self._trained(question, state, u, kept) for u in updates]
                        case "validate":
                            updates = _in_order(clients, method.validate(model, state, clients))
                            answers = [self._validated(question, u) for u in updates]
                        case "personalize":
                            outcomes = _in_order(clients, method.personalize(model, state, clients))
                            answers = [
                                self._personalized(question, model, state, o) for o in outcomes
                            ]
                except Exception as error:
                    if len(names) > 1:
                        size = self.stack_size if len(names) > self.stack_size else 1
                        calls += reversed([names[i : i + size] for i in range(0, len(names), size)])
                        continue
                    log.debug("client %s raised", names[0], exc_info=True)
                    answers = [self._failed(question, names[0], _reason(error))]
                yield from answers

    def fault(self, name: str) -> str | None:
        """Return why a client's data cannot be used, in one line, or None if they can."""
        try:
            self._open(name)
        except Exception as error:
            log.debug("client %s cannot be opened", name, exc_info=True)
            return _reason(error)
        return None

    def _checked(self, name: str) -> ClientData:
        """Return the data of a client, which fit the model and its loss."""
        data = self.population.open(name).to(self.device)
        check_client(working_copies(self.model).net, data, name)
        return data

    def _load(self, question: Question) -> nn.Module:
        """Return the model with the frozen weights of a question."""
        key, weights = question.model.key, question.model.weights
        if weights is not None and self.models.get(key) is None:
            self.models.add(weights)
        if key != self._loaded:
            known = self.models.get(key)
            if known is None:
                raise UnknownModelError(f"model {key} is not here; send its weights")
            self._loaded = ""  # unknown while it is half done
            load_state_tensors(self.model, known)
            self._loaded = key
        return self.model

    def _portions(self, question: Question) -> Iterator[list[str]]:
        """Cut the clients into calls of whole stacks, by the bytes of their data and states."""
        names = list(question.seeds)
        state = sum(t.numel() * t.element_size() for t in question.state.values())
        portion: list[str] = []
        filled = 0
        for begin in range(0, len(names), self.stack_size):
            stack = names[begin : begin + self.stack_size]
            size = sum(self._size_of(name) + state for name in stack)
            if portion and filled + size > self._keep_bytes:
                yield portion
                portion, filled = [], 0
            portion += stack
            filled += size
        if portion:
            yield portion

    def _size_of(self, name: str) -> int:
        try:
            return size_of(self._open(name))
        except Exception:  # reported when the client is worked on
            return 0

    def _client(self, question: Question, name: str, kept: Mapping[str, State]) -> Client:
        return Client(
            name=name,
            data=self._open(name),
            kept={k: v.to(self.device) for k, v in kept.get(name, {}).items()},
            seed=question.seeds[name],
            round=question.round,
            wants_model=self._wants_models and question.action == "personalize",
        )

    def _trained(
        self,
        question: Question,
        state: State,
        update: Update,
        kept: MutableMapping[str, State],
    ) -> Answer:
        failure = update.failure or objection(update, sent=state)
        if failure is None and (name := not_finite(update.kept)) is not None:
            failure = f"tensor {name!r} that it keeps holds NaN or infinity"
        privacy = self._local.get(question.method)
        if failure is None and update.kept:
            kept[update.client] = update.kept
        elif failure is None:
            kept.pop(update.client, None)
        if privacy is None and failure is not None:
            return Answer(client=update.client, failure=failure)
        if privacy is not None:
            if failure is not None:
                log.warning("client %s failed and sends noise alone: %s", update.client, failure)
            from_seed = privacy.seeded(simulated=self._simulated)
            draw = seeded(question.seeds[update.client], "privacy") if from_seed else system
            update = privatised(dataclasses.replace(update, failure=failure), state, privacy, draw)
        shared = {k: on_cpu(v) for k, v in update.shared.items()}
        return Answer(
            client=update.client, update=dataclasses.replace(update, shared=shared, kept={})
        )

    def _validated(self, question: Question, update: Update) -> Answer:
        failure = update.failure or objection(dataclasses.replace(update, shared={}), sent={})
        if failure is not None:
            return self._failed(question, update.client, failure)
        if question.method in self._local:
            return Answer(client=update.client, update=Update(update.client, weight=1.0))
        return Answer(
            client=update.client,
            update=Update(update.client, weight=update.weight, metrics=update.metrics),
        )

    def _personalized(
        self, question: Question, model: nn.Module, state: State, outcome: Outcome
    ) -> Answer:
        if outcome.failure is not None:
            return self._failed(question, outcome.client, outcome.failure)
        if self._on_personalized is not None:
            self._on_personalized(question.method, model, state, outcome)
        numbers = dataclasses.replace(outcome, hyperparams=None, profile=None, model=None)
        return Answer(client=outcome.client, outcome=numbers)

    def _failed(self, question: Question, name: str, reason: str) -> Answer:
        """Return the answer of a client that failed."""
        if question.action == "personalize":
            try:
                data = self._open(name)
            except Exception:  # then that is the reason, and its examples are not known
                return Answer(client=name, failure=reason)
            tested = 0 if data.test is None else data.test.num
            outcome = failed_outcome(name, reason, data.train.num, tested)
            return Answer(client=name, outcome=outcome)
        if question.method in self._local:  # no metric and no reason may leave the client
            log.warning("client %s failed: %s", name, reason)
            reason = "it failed; under local privacy the reason stays on the node"
        return Answer(client=name, failure=reason)


def failed_outcome(client: str, reason: str, num_train: int = 0, num_test: int = 0) -> Outcome:
    """Return the outcome of a client that could not be personalized; its other numbers are NaN."""
    return Outcome(
        client=client,
        num_train=num_train,
        num_test=num_test,
        accuracy_before=nan,
        accuracy=nan,
        loss_before=nan,
        loss=nan,
        seconds=nan,
        failure=reason,
    )


def _reason(error: Exception) -> str:
    """Return an error in one line."""
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("%s: %s", kind, error)
        return f"{kind}: its disk is full; its log says more"
    return one_line(f"{kind}: {error}".partition("\n")[0])


def _in_order(clients: Sequence[Client], results: Sequence[T]) -> Sequence[T]:
    asked, answered = [c.name for c in clients], [r.client for r in results]
    if asked != answered:
        raise ValueError(f"the method was asked for {asked} but answered for {answered}")
    return results
