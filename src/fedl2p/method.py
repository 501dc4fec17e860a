"""The interface that a personalization method implements.

A method defines what travels (``Update.shared``), what stays on the client (``kept``), how clients
train, and how they are personalized. Everything else (sampling, messages, aggregation, checkpoints,
reports) is the same for every method and lies elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedl2p.core.clientdata import ClientData
    from fedl2p.core.hyperparams import Hyperparams
    from fedl2p.core.metanets import MetaNets
    from fedl2p.core.profiles import Profile

State = dict[str, "Tensor"]
"""Any named tensors that travel or stay."""


@dataclass(frozen=True)
class Client:
    """One client in one call of a method.

    Parameters
    ----------
    name
        The client's name, unique in its population.
    data
        Its examples.
    kept
        The tensors that it kept at the last call of the same method; empty at first.
    seed
        Derived from (study seed, stage, round, client name); the source of all randomness here.
    round
        The federation round, from 1; 0 outside the rounds.
    wants_model
        Whether its outcome is to hold the personalized model.
    """

    name: str
    data: ClientData
    kept: State = field(default_factory=dict)
    seed: int = 0
    round: int = 0
    wants_model: bool = False


@dataclass(frozen=True)
class Update:
    """The result of one training call of one client.

    Parameters
    ----------
    client
        Its name.
    shared
        Tensors that travel to the server; the same names, shapes and dtypes as the state received.
    kept
        Tensors that stay on the client and come back in ``Client.kept``.
    weight
        Weight in the average, a number of examples, > 0.
    metrics
        ``loss`` and ``accuracy`` of the *received* state on the client's validation part (its
        training part if it has none), so that a round's metrics are those of the state after the
        last aggregation.
    failure
        None, or one line that says why this client has no usable answer; then the rest is void.
    """

    client: str
    shared: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)
    weight: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The numbers of one personalized client. Accuracies are fractions in [0, 1], on ``test``.

    Parameters
    ----------
    num_train, num_test
        Numbers of examples.
    accuracy_before, loss_before
        Of the starting model without fine-tuning, mean cross-entropy in nats.
    accuracy, loss
        Of the personalized model.
    seconds
        Wall-clock time to personalize this client (its share of the cohort's call), evaluation
        not counted.
    """

    num_train: int
    num_test: int
    accuracy_before: float
    accuracy: float
    loss_before: float
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome(Scores):
    """One client's result after personalization.

    Parameters
    ----------
    client
        Its name.
    hyperparams, profile
        What it fine-tuned with and why, where the method has such; these never travel.
    model
        The personalized model, plain batch-norm, for a client that wants it (see :class:`Client`);
        it never travels.
    failure
        None, or one line that says why personalization failed.
    """

    client: str
    hyperparams: Hyperparams | None = None
    profile: Profile | None = None
    model: nn.Module | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A federated or local method. Instances are frozen and hold their own settings only."""

    name: str

    @property
    def starts_from(self) -> Literal["scratch", "pretrained"]:
        """Whether ``model`` holds initial weights or the pre-trained global ones."""
        return "pretrained"

    @property
    def rounds(self) -> Literal["none", "one", "pretrain", "learn"]:
        """Which rounds of a study it trains for.

        ``none``: it only personalizes; ``one``: a single round with every seen client;
        ``pretrain`` and ``learn``: as many, with the same draws of cohorts, as those stages.
        """
        return "learn"

    @property
    def stage(self) -> str:
        """The stage that its rounds are: part of every client's seed, and a column of the records.

        By default its name.
        """
        return self.name

    @property
    def trained_by_pretraining(self) -> bool:
        """Whether pre-training, which is federated averaging, was its training already.

        Then no rounds are run for it, and its state is that of pre-training.
        """
        return False

    @abstractmethod
    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        """Return the state that travels in the first round.

        ``model`` is only read; ``seed`` is the source of all randomness here.
        """

    @abstractmethod
    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Train a cohort of clients, from one to all; one update per client, in the same order.

        ``model`` and ``state`` are only read. A client's update depends on nothing but the model,
        the state and that client: the size of the cohort changes it by rounding at most.
        """

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Evaluate a state without training; updates have ``weight`` and ``metrics`` only."""
        return [
            Update(u.client, weight=u.weight, metrics=u.metrics, failure=u.failure)
            for u in self.train(model, state, clients)
        ]

    @abstractmethod
    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Personalize and evaluate a cohort of clients; one outcome per client, in order.

        A client never seen in training has an empty ``kept``.
        """

    def final_metanets(self, model: nn.Module, state: State) -> MetaNets | None:
        """Return the meta-nets that a run keeps for later clients; None if it learns none.

        ``model`` is the global model, ``state`` that after the last round.
        """
        return None
