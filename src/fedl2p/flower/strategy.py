"""FedL2P as a Flower strategy, for a ServerApp of one's own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedl2p import methods
from fedl2p.core.functional.copies import duplicate
from fedl2p.core.functional.state_tensors import load_state_tensors
from fedl2p.core.metanets import MetaNets
from fedl2p.data.population import Population
from fedl2p.federation.flower import records
from fedl2p.federation.flower.client_directory import read_keys
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.flower.gathering import wait_for_clients
from fedl2p.federation.flower.shown_log import LogListener, shown
from fedl2p.federation.listeners import Listener
from fedl2p.federation.messages import Answer, Question
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import DEFAULT_ROUNDS, GRACE, TIMEOUT, Rounds
from fedl2p.flower.handlers import hash_of
from fedl2p.method import Outcome
from fedl2p.methods.base.settings import Settings
from fedl2p.runs.columns import SCORES
from fedl2p.study.metanets_card import learned_card

log = logging.getLogger("fedl2p")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class FedL2P(Strategy):
    """Learns, across the federation's clients, how each should fine-tune the global model.

    Start it after pre-training, with the arrays of the global model. Clients need
    :func:`~fedl2p.flower.handlers.add_fedl2p` in their ClientApp.

    Parameters
    ----------
    model
        The global model's architecture; only read.
    rounds
        Clients per round, server optimizer, robust rule, privacy; its number of rounds is that of
        :meth:`start`.
    settings
        Inner and outer loop, the same as the clients'.
    seed
        The source of all randomness.
    min_available_nodes
        How many clients to wait for, as in Flower's own strategies.
    wait
        Seconds to wait for them.
    grace
        When half of the clients have answered, the others have as long again as these needed, but
        at least this many seconds.
    keys
        A folder of ``CLIENT.pub`` files: a client is believed only on the node with that key.
    listeners
        Called with every round.

    Attributes
    ----------
    metanets
        The learned meta-nets after :meth:`start`, to be saved or given to
        :func:`fedl2p.personalize`.
    outcomes
        What came of each client's personalization, in the order of their names.

    Notes
    -----
    The rounds are not those of Flower's loop: a client that lacks the global model is sent it
    again, and answers are checked before they are decoded. So :meth:`start` is the only way in, and
    Flower's wrappers for differential privacy cannot be put around it; privacy is a setting of
    ``rounds``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rounds: Rounds = DEFAULT_ROUNDS,
        settings: Settings | None = None,
        seed: int = 0,
        min_available_nodes: int = 2,
        wait: float = 600.0,
        grace: float = GRACE,
        keys: str | Path | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.metanets: MetaNets | None = None
        self.outcomes: list[Outcome] = []
        self._model = model
        self._rounds, self._settings, self._seed = rounds, settings or Settings(), seed
        self._least, self._wait, self._grace = min_available_nodes, wait, grace
        self._keys = None if keys is None else read_keys(Path(keys))
        self._listeners = (LogListener(), *listeners)
        self._method = methods.build(methods.METANETS, self._settings)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = TIMEOUT,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Learn the meta-nets, then have every client personalize itself.

        Parameters
        ----------
        grid
            The ServerApp's.
        initial_arrays
            The global model, e.g. ``Result.arrays`` of pre-training. It does not change.
        num_rounds
            Rounds of meta-learning.
        timeout
            Most seconds to wait for the answers to one question.
        train_config, evaluate_config
            Not taken: clients have their settings from ``add_fedl2p``.
        evaluate_fn
            Called with the round's number and the meta-nets' arrays before the first round and
            after each.

        Returns
        -------
        Result
            ``arrays``: the meta-nets. ``train_metrics_clientapp``, by round: loss and accuracy on
            validation parts, with the meta-nets that the round began with.
            ``evaluate_metrics_clientapp[num_rounds]``: scores of the personalized models, weighted
            by test examples.

        Raises
        ------
        ValueError
            If too few clients come, or something given cannot be used.
        fedl2p.FederationError
            If too many rounds in a row bring nothing.
        """
        if train_config or evaluate_config:
            raise ValueError(
                "train_config and evaluate_config reach no client of FedL2P; give settings to "
                "FedL2P and add_fedl2p"
            )
        with shown():
            return self._run(grid, initial_arrays, num_rounds, timeout, evaluate_fn)

    def _run(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        timeout: float,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        model = self._loaded(initial_arrays)
        result = Result()
        clients = _Watched(
            *(grid, timeout, self._grace, self._keys, hash_of(self._settings)),
            evaluate=evaluate_fn,
            metrics=result.evaluate_metrics_serverapp,
        )
        names = wait_for_clients(clients.directory, count=self._least, seconds=self._wait)
        done = federate(
            self._method,
            model,
            _Names(names),
            rounds=dataclasses.replace(self._rounds, rounds=num_rounds),
            seed=self._seed,
            stage=self._method.stage,
            clients=clients,
            listeners=self._listeners,
        )
        self.metanets = self._method.final_metanets(model, done.state)
        assert self.metanets is not None
        self.metanets.card = learned_card(
            self.metanets,
            model,
            self._method,
            rounds=dataclasses.replace(self._rounds, rounds=num_rounds),
            clients=clients,
            seen=len(names),
            seed=self._seed,
            data_licence=None,
        )
        result.arrays = records.encode_state(done.state)
        for record in done.records[:num_rounds]:
            numbers = MetricRecord({"clients": record.clients, "failures": record.failures})
            for name, value in (("loss", record.loss), ("accuracy", record.accuracy)):
                if isfinite(value):
                    numbers[name] = value
            result.train_metrics_clientapp[record.round] = numbers
        self.outcomes = self._personalized(clients, model, result.arrays, names)
        result.evaluate_metrics_clientapp[num_rounds] = _scores(self.outcomes)
        log.info("personalized: %s", result.evaluate_metrics_clientapp[num_rounds])
        return result

    def personalize(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        metanets: ArrayRecord,
        *,
        timeout: float = TIMEOUT,
    ) -> MetricRecord:
        """Have the clients that are there personalize themselves, e.g. ones that came later.

        Parameters
        ----------
        grid, timeout
            As in :meth:`start`.
        initial_arrays, metanets
            The global model, and ``Result.arrays`` of :meth:`start`.

        Returns
        -------
        MetricRecord
            Scores of the personalized models, weighted by test examples.
        """
        model = self._loaded(initial_arrays)
        clients = _Watched(grid, timeout, self._grace, self._keys, hash_of(self._settings))
        with shown():
            names = wait_for_clients(clients.directory, count=self._least, seconds=self._wait)
            self.outcomes = self._personalized(clients, model, metanets, names)
        return _scores(self.outcomes)

    def summary(self) -> None:
        """Log what will be done."""
        log.info("FedL2P: %s; %s; seed %d", self._rounds, self._settings, self._seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: :meth:`start` runs the rounds."""
        _refuse()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse: :meth:`start` runs the rounds."""
        _refuse()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: :meth:`start` runs the rounds."""
        _refuse()

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Refuse: :meth:`start` runs the rounds."""
        _refuse()

    def _loaded(self, arrays: ArrayRecord) -> nn.Module:
        model = duplicate(self._model)
        try:
            load_state_tensors(model, arrays.to_torch_state_dict())
        except RuntimeError as error:
            line = " ".join(str(error).split())
            raise ValueError(f"initial_arrays are not those of the model: {line}") from None
        return model

    def _personalized(
        self, clients: OnFlower, model: nn.Module, metanets: ArrayRecord, names: Sequence[str]
    ) -> list[Outcome]:
        return personalize_all(
            self._method,
            model,
            records.decode_state(metanets),
            _Names(names),
            seed=self._seed,
            clients=clients,
            listeners=self._listeners,
            has_accuracy=False,  # a client may have a loss without one
        )


class _Watched(OnFlower):
    """Clients of a strategy; whoever evaluates on the server sees each state that is sent."""

    def __init__(
        self,
        grid: Grid,
        timeout: float,
        grace: float,
        keys: dict[str, bytes] | None,
        settings: str,
        *,
        evaluate: EvaluateFn | None = None,
        metrics: dict[int, MetricRecord] | None = None,
    ) -> None:
        super().__init__(grid, timeout=timeout, grace=grace, keys=keys, settings=settings)
        self._evaluate, self._metrics = evaluate, {} if metrics is None else metrics

    def ask(self, question: Question) -> Iterator[Answer]:
        if self._evaluate is not None and question.action != "personalize":
            # What a round sends is what the round before has made.
            number = question.round - 1
            found = self._evaluate(number, records.encode_state(question.state))
            if found is not None:
                self._metrics[number] = found
        yield from super().ask(question)


class _Names(Population):
    """The server's side of clients elsewhere: names alone."""

    shape = ()
    classes = 0

    def __init__(self, names: Sequence[str]) -> None:
        self.seen, self.unseen = tuple(names), ()

    def open(self, name: str) -> Any:
        raise ValueError(f"the data of client {name!r} are on its node")


def _scores(outcomes: Sequence[Outcome]) -> MetricRecord:
    """Return the means of the scores by test examples, over the clients that have them."""
    good = [o for o in outcomes if o.failure is None]
    means: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": sum(o.num_test for o in good),
        "clients": len(good),
        "failures": len(outcomes) - len(good),
    }
    for name in SCORES:
        if name.startswith(("accuracy", "loss")):
            pairs = [(o.num_test, getattr(o, name)) for o in good if isfinite(getattr(o, name))]
            if total := sum(count for count, _ in pairs):
                means[name] = sum(count * value for count, value in pairs) / total
    return MetricRecord(means)


def _refuse() -> NoReturn:
    raise ValueError(
        "FedL2P runs its own rounds: call start(); for differential privacy give it "
        "rounds=Rounds(privacy=...)"
    )
