"""Local SGD in federated rounds: what FedAvg and the methods built on it share.

They differ in what a client keeps, in how it trains, and in how it is personalized; each says so in
its file. For all of them:

- They start from the initial weights and train for the rounds of pre-training, with its cohorts.
- Batch-norm trains as in plain PyTorch. Running statistics that travel are averaged like weights.
- A round's metrics evaluate what a client would use without training: the received tensors and, of
  those that never travel, the kept ones.
- **Personalization is one more update of the client, for the epochs of fine-tuning** and with its
  optimizer (setting ``finetune``, as in every other method), unless the method's file says
  otherwise; ditto and apfl take steps of their own, of plain SGD only. It starts from the final
  state and what the client kept; for a client never seen, tensors that never travel start from the
  initial weights. Running statistics start afresh as ``finetune.statistics`` says, so that they are
  the client's. Published evaluations differ in this: some take the models as the last round left
  them, in which a client that was not drawn lately is behind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.in_place_sgd import Gradient, batch_gradient, sgd
from fedl2p.core.finetuning.inner_loop import all_finite, inner_batches, run_inner_loop
from fedl2p.core.finetuning.optimizers import optimizer_of
from fedl2p.core.finetuning.stacking import map_stacks
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.personalizing import (
    DIVERGED,
    PersonalModels,
    constant_hyperparams,
    constant_mix,
    evaluation_updates,
    model_with_state,
    personal_outcomes,
    validation_part,
    with_final_data,
)
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.methods.base.tensor_groups import (
    client_states,
    client_tensors,
    initial_tensors,
    kept_copies,
    tensor_names,
)
from fedl2p.seeds import derive_seed


@dataclass(frozen=True)
class RoundResult:
    """The result of one round of local training of C clients.

    Parameters
    ----------
    state
        Their models, of which the travelling tensors are averaged.
    kept
        Tensors that each client keeps.
    """

    state: ModelState
    kept: Sequence[State]


@dataclass(frozen=True, kw_only=True)
class LocalSGD(Method):
    """Federated averaging; the base of methods that change a part of it.

    Parameters
    ----------
    local
        Local training of one round.
    inner
        Epochs and batch size of personalization; 0 epochs evaluate the model as it is.
    rate
        Learning rate of personalization.
    """

    local: LocalTraining
    inner: InnerLoop = field(default_factory=lambda: InnerLoop(epochs=0))
    rate: float = 0.0

    @property
    def starts_from(self) -> Literal["scratch"]:
        """Initial weights."""
        return "scratch"

    @property
    def rounds(self) -> Literal["pretrain"]:
        """As many rounds as pre-training, which is FedAvg."""
        return "pretrain"

    @property
    def unequal_sizes(self) -> bool:
        """Whether the clients of a stack may have unequally many examples.

        They may where training follows the gradient of the loss on batches, not a gradient of the
        method's own.
        """
        return True

    @property
    def round_loop(self) -> InnerLoop:
        """The inner loop of a round's local training."""
        return InnerLoop(
            epochs=self.local.epochs, batch_size=self.local.batch_size, statistics="global"
        )

    def kept_names(self, net: FunctionalModel) -> frozenset[str]:
        """Return the names of the tensors that never travel and that the client keeps."""
        return frozenset()

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        """Return the initial values of all tensors that travel."""
        net = working_copies(model).net
        kept = self.kept_names(net)
        return {name: tensor for name, tensor in initial_tensors(net).items() if name not in kept}

    def train_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> RoundResult:
        """Train a stack of clients for one round."""
        trained = run_local_sgd(
            net,
            client_states(net, state, clients),
            clients,
            self.round_loop,
            self.local.rate_in(clients[0].round),
        )
        return RoundResult(trained, self.kept_tensors(net, trained, len(clients)))

    def kept_tensors(self, net: FunctionalModel, trained: ModelState, clients: int) -> list[State]:
        """Return the tensors that each client keeps of its trained model."""
        names = self.kept_names(net)
        return [kept_copies(client_tensors(net, trained, j, names)) for j in range(clients)]

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Train every client for one round, from the received tensors and those that it kept."""
        net = working_copies(model).net
        net.examine(clients[0].data.train.x)  # which part is the head shows when it runs
        if set(state) != set(tensor_names(net)) - self.kept_names(net):
            raise ValueError(
                f"{self.name} parts the model here otherwise than the sender of its state did, who "
                "could not run it; name the head by head= (baselines.head)"
            )
        read = clients
        if self.local.reads == "train+validation":
            read = [replace(c, data=c.data.joined()) for c in clients]

        def stack(given: Sequence[Client], clients: Sequence[Client]) -> list[Update]:
            received = self.validate_stack(net, state, given)
            result = self.train_stack(net, state, clients)
            finite = all_finite(result.state).tolist()
            return [
                Update(
                    client.name,
                    shared=client_tensors(net, result.state, j, state),
                    kept=result.kept[j],
                    weight=float(client.data.train.num),
                    metrics=received[j].metrics,
                    failure=None if finite[j] else DIVERGED,
                )
                for j, client in enumerate(clients)
            ]

        data = [c.data for c in read]
        return map_stacks(stack, net, data, clients, read, unequal_sizes=self.unequal_sizes)

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Evaluate the received tensors, with the kept ones, on every client's validation part."""
        net = working_copies(model).net

        def stack(clients: Sequence[Client]) -> list[Update]:
            return self.validate_stack(net, state, clients)

        data = [c.data for c in clients]
        return map_stacks(stack, net, data, clients, unequal_sizes=self.unequal_sizes)

    def validate_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> list[Update]:
        """Evaluate a stack of clients before they train."""
        parts = [validation_part(c) for c in clients]
        mix = constant_mix(net, len(clients), 1.0)
        scores = evaluate(net, client_states(net, state, clients), mix, parts)
        return evaluation_updates(clients, parts, scores)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Personalize every client; before that, it has the final state and what it kept."""
        # A model that holds the final state, so that a tensor neither received nor kept is its own.
        net = working_copies(model_with_state(model, state)).net
        clients = with_final_data(clients, self.inner)

        def personalize_stack(clients: Sequence[Client]) -> PersonalModels:
            return self.personalize_stack(net, state, clients)

        return personal_outcomes(
            net,
            clients,
            client_states(net, state, clients),
            constant_mix(net, len(clients), 1.0),
            personalize_stack,
            unequal_sizes=self.unequal_sizes,
        )

    def personalize_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> PersonalModels:
        """Personalize a stack of clients. The net holds the final state."""
        start = client_states(net, state, clients)
        return finetune_plain(net, start, clients, self.inner, self.rate)


def run_local_sgd(
    net: FunctionalModel,
    start: ModelState,
    clients: Sequence[Client],
    inner: InnerLoop,
    rate: float,
    *,
    only: Collection[str] | None = None,
    gradient: Gradient | None = None,
    stream: str = "local",
) -> ModelState:
    """Train a stack of clients with plain batch-norm and the optimizer of ``inner``.

    Parameters
    ----------
    net, start, clients
        The model, the clients' states before training, the clients.
    inner, rate
        Epochs, batch size and optimizer (plain SGD with a ``gradient``); the learning rate.
    only
        Names of the tensors that train; None for all. Running statistics always follow.
    gradient
        The gradient that a step follows, for clients with equally many examples; None for that of
        the loss on the batches of ``stream``.
    stream
        Which draw of batches: ``local`` in a round, ``finetune`` in personalization (the same
        batches in every method), or a further one of the method.
    """
    hyperparams = constant_hyperparams(net, len(clients), mix=1.0, rate=rate, only=only)
    if gradient is not None:
        assert inner.plain_sgd, "a method with a gradient of its own takes no optimizer"
        return sgd(start, hyperparams.rate, gradient, range(inner.steps(clients[0].data.train.num)))
    return run_inner_loop(
        net,
        hyperparams,
        _draw_batches(net, clients, inner, stream),
        statistics=inner.statistics,
        start=start,
        optimizer=optimizer_of(inner),
    )


def loss_gradient(
    net: FunctionalModel, clients: Sequence[Client], inner: InnerLoop, stream: str
) -> Gradient:
    """Return the gradient of the training loss on a draw of batches, with plain batch-norm."""
    mix = constant_mix(net, len(clients), 1.0)
    return batch_gradient(net, mix, _draw_batches(net, clients, inner, stream))


def _draw_batches(
    net: FunctionalModel, clients: Sequence[Client], inner: InnerLoop, stream: str
) -> EpochBatches:
    seeds = [derive_seed(c.seed, stream) for c in clients]
    return inner_batches(net, [c.data for c in clients], seeds, inner)


def finetune_plain(
    net: FunctionalModel,
    start: ModelState,
    clients: Sequence[Client],
    inner: InnerLoop,
    rate: float,
    *,
    only: Collection[str] | None = None,
) -> PersonalModels:
    """Fine-tune a stack of clients at one rate, with batch-norm statistics of their own."""
    begin = with_fresh_statistics(net, start, inner)
    state = run_local_sgd(net, begin, clients, inner, rate, only=only, stream="finetune")
    hyperparams = constant_hyperparams(net, len(clients), mix=1.0, rate=rate, only=only)
    return PersonalModels(state, hyperparams.mix, hyperparams if inner.epochs else None)


def with_fresh_statistics(net: FunctionalModel, state: ModelState, inner: InnerLoop) -> ModelState:
    """Return a state whose running statistics start as ``inner.statistics`` says.

    Those that go on (``global``), and those that no data will enter, stay.
    """
    if inner.statistics == "global" or not inner.epochs:
        return state
    clients = len(next(iter(state.params.values())))
    stats = net.start(clients, inner.statistics).stats
    others = {name: state.stats[name] for name in net.other_buffers if name in state.stats}
    return ModelState(state.params, stats | others)
