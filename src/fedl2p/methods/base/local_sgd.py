"""Federated training by local SGD: what FedAvg and the baselines built on it share.

They differ in what stays on a client, in how a client trains, and in how it is personalized; each
says so in a file of its own. What holds for all of them:

- They start from the initial weights and train for the rounds of pre-training, with its cohorts.
- Batch-norm trains as in plain PyTorch. Running statistics that travel are averaged like weights.
- A round's metrics judge what a client would use without training: the received tensors and, of
  those that never travel, its own.
- **Personalization is one more update of the client, for the epochs of fine-tuning** (setting
  ``finetune``, as in every other method), unless the method's file says otherwise. It starts from
  the final state and what the client kept; for a client never seen, tensors that never travel start
  from the initial weights. Running statistics start afresh as ``finetune.statistics`` says, so that
  they are the client's own. Published evaluations differ in this: some take the models as the last
  round left them, in which a client that was not drawn lately is behind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.core.finetuning.in_place_sgd import Gradient, batch_gradient, descent
from fedl2p.core.finetuning.inner_loop import batches_of, finite, run_inner_loop
from fedl2p.core.finetuning.stacking import evaluate, over_stacks, resident
from fedl2p.core.functional.model import Net, NetState
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import InnerLoop
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.personalizing import (
    DIVERGED,
    Tuned,
    final_clients,
    metrics_of,
    outcomes,
    same_mix,
    uniform,
    validation_part,
    with_state,
)
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.methods.base.tensor_groups import initial, stacked, tensor_names, tensors_of, to_keep
from fedl2p.seeds import derive_seed


@dataclass(frozen=True)
class Fitted:
    """What one round of local training made of C clients.

    Parameters
    ----------
    state
        Their models, of which the travelling tensors are averaged.
    kept
        What each keeps.
    """

    state: NetState
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
    def ragged(self) -> bool:
        """Whether :meth:`fit` and :meth:`adapt` take clients with unequally many examples.

        They do where training goes down the loss on batches, not a gradient of the method's own.
        """
        return True

    @property
    def round_loop(self) -> InnerLoop:
        """The inner loop of a round's local training."""
        return InnerLoop(
            epochs=self.local.epochs, batch_size=self.local.batch_size, statistics="global"
        )

    def stays(self, net: Net) -> frozenset[str]:
        """Return the names of the tensors that never travel."""
        return frozenset()

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        """Return the initial values of all tensors that travel."""
        net = resident(model).net
        stays = self.stays(net)
        return {name: tensor for name, tensor in initial(net).items() if name not in stays}

    def fit(self, net: Net, state: State, clients: Sequence[Client]) -> Fitted:
        """Train a stack of clients for one round; of what stays, each keeps its own."""
        trained = descend(
            net,
            stacked(net, state, clients),
            clients,
            self.round_loop,
            self.local.rate_in(clients[0].round),
        )
        return Fitted(trained, self.own(net, trained, len(clients)))

    def own(self, net: Net, trained: NetState, clients: int) -> list[State]:
        """Return what each client keeps of its trained model: the tensors that never travel."""
        stays = self.stays(net)
        return [to_keep(tensors_of(net, trained, j, stays)) for j in range(clients)]

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Train every client for one round, from the received tensors and its own."""
        net = resident(model).net
        judged = self.validate(model, state, clients)
        if set(state) != set(tensor_names(net)) - self.stays(net):
            raise ValueError(
                f"{self.name} parts the model here otherwise than the sender of its state did, who "
                "could not run it; name the head by head= (baselines.head)"
            )
        if self.local.reads == "train+validation":
            clients = [replace(c, data=c.data.joined()) for c in clients]

        def stack(members: list[int]) -> list[Update]:
            own = [clients[i] for i in members]
            fitted = self.fit(net, state, own)
            sound = finite(fitted.state).tolist()
            return [
                Update(
                    c.name,
                    shared=tensors_of(net, fitted.state, j, state),
                    kept=fitted.kept[j],
                    weight=float(len(c.data.train.x)),
                    metrics=judged[i].metrics,
                    failure=None if sound[j] else DIVERGED,
                )
                for j, (i, c) in enumerate(zip(members, own, strict=True))
            ]

        return over_stacks(net, [c.data for c in clients], stack, ragged=self.ragged)

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Judge the received tensors, with the client's own, on every client's validation part."""
        net = resident(model).net
        parts = [validation_part(c) for c in clients]
        mix = same_mix(net, len(clients), 1.0)
        scores = evaluate(net, stacked(net, state, clients), mix, parts)
        return [
            Update(c.name, weight=float(len(part.x)), metrics=metrics_of(*score))
            for c, part, score in zip(clients, parts, scores, strict=True)
        ]

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Personalize; before that, a client has the final state and what it kept."""
        # A net of its own, so that whatever falls back on the model falls back on the final state.
        net = resident(with_state(model, state)).net
        clients = final_clients(clients, self.inner)

        def tuned(members: list[int]) -> Tuned:
            return self.adapt(net, state, [clients[i] for i in members])

        mix = same_mix(net, len(clients), 1.0)
        return outcomes(net, clients, stacked(net, state, clients), mix, tuned, ragged=self.ragged)

    def adapt(self, net: Net, state: State, clients: Sequence[Client]) -> Tuned:
        """Personalize a stack of clients. The net holds the final state."""
        return finetuned(net, stacked(net, state, clients), clients, self.inner, self.rate)


def descend(
    net: Net,
    start: NetState,
    clients: Sequence[Client],
    inner: InnerLoop,
    rate: float,
    *,
    only: Collection[str] | None = None,
    gradient: Gradient | None = None,
    stream: str = "local",
) -> NetState:
    """Train a stack of clients with plain batch-norm and plain SGD.

    Parameters
    ----------
    only
        Names of the tensors that train; None for all. Running statistics always follow.
    gradient
        What a step goes down, for clients of equal shapes; None for that of the loss on the batches
        of ``stream``.
    stream
        Which draw of batches: ``local`` in a round, ``finetune`` in personalization (the same
        batches in every method), or a method's own further one.
    """
    rates = uniform(net, len(clients), mix=1.0, rate=rate, only=only).rate
    if gradient is not None:
        return descent(start, rates, gradient, range(inner.steps(len(clients[0].data.train.x))))
    return run_inner_loop(
        net,
        Hyperparams(same_mix(net, len(clients), 1.0), rates, net.sites),
        _drawn(net, clients, inner, stream),
        statistics=inner.statistics,
        start=start,
    )


def loss_gradient(net: Net, clients: Sequence[Client], inner: InnerLoop, stream: str) -> Gradient:
    """Return the gradient of the training loss on a draw of batches, with plain batch-norm."""
    mix = same_mix(net, len(clients), 1.0)
    return batch_gradient(net, mix, _drawn(net, clients, inner, stream))


def _drawn(net: Net, clients: Sequence[Client], inner: InnerLoop, stream: str) -> EpochBatches:
    seeds = [derive_seed(c.seed, stream) for c in clients]
    return batches_of(net, [c.data for c in clients], seeds, inner)


def finetuned(
    net: Net,
    start: NetState,
    clients: Sequence[Client],
    inner: InnerLoop,
    rate: float,
    *,
    only: Collection[str] | None = None,
) -> Tuned:
    """Fine-tune a stack of clients with plain SGD and statistics of their own."""
    begin = afresh(net, start, inner)
    state = descend(net, begin, clients, inner, rate, only=only, stream="finetune")
    hyperparams = uniform(net, len(clients), mix=1.0, rate=rate, only=only)
    return Tuned(state, hyperparams.mix, hyperparams if inner.epochs else None)


def afresh(net: Net, state: NetState, inner: InnerLoop) -> NetState:
    """Return a state whose running statistics start as fine-tuning's do.

    Those that go on (``statistics="global"``), and those that no data will enter, stay.
    """
    if inner.statistics == "global" or not inner.epochs:
        return state
    clients = len(next(iter(state.params.values())))
    stats = net.start(clients, inner.statistics).stats
    others = {name: state.stats[name] for name in net.other_buffers if name in state.stats}
    return NetState(state.params, stats | others)
