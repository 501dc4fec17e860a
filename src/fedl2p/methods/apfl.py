"""APFL: each client uses a mixture of the global and a local model, and learns how much of each.

Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, arXiv 2003.13461, algorithm
1. A client trains its copy w of the global model as in FedAvg, and besides a local model v through
the mixture v' = alpha v + (1 - alpha) w, on the same batches: ::

    w <- w - eta grad f(w),    v <- v - eta alpha grad f(v'),

both from the values before the step. w is averaged; v and alpha stay. The adaptive alpha takes one
step a round, alpha <- alpha - eta <v - w, grad f(v')>, kept in [0, 1], at the first batch of the
round as in the authors' code. alpha 0 is FedAvg's model, alpha 1 local training.

Personalization is one more client update of which nothing is sent, over the epochs of fine-tuning;
the client uses the mixture. A client never seen starts with v = w and the initial alpha. Before
that, a client is evaluated with w.

Departures: the derivative by alpha is the gradient alone (the authors' code adds a small shrinkage
of alpha); a mixture of running statistics is not the statistics of a mixture, so the mixture starts
a round with alpha kept + (1 - alpha) received ones and from there has those of its own forward
passes; only these, not v's, are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedl2p.core.finetuning.in_place_sgd import Gradient
from fedl2p.core.finetuning.sgd_step import sgd_update
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.named_tensors import NamedTensors, inner_product
from fedl2p.core.settings import InnerLoop
from fedl2p.method import Client, State
from fedl2p.methods.base.local_sgd import (
    LocalSGD,
    RoundResult,
    loss_gradient,
    with_fresh_statistics,
)
from fedl2p.methods.base.personalizing import PersonalModels, constant_hyperparams, constant_mix
from fedl2p.methods.base.tensor_groups import (
    client_states,
    client_tensors,
    kept_copies,
    tensor_names,
)

LOCAL, ALPHA = "local.", "alpha"
"""Names among what a client keeps: prefix of v and the mixture's statistics; alpha, shape (1,)."""


@dataclass(frozen=True)
class Pair:
    """The two models of C clients and their mixture.

    Parameters
    ----------
    shared
        w, with running statistics of its own.
    local
        v, with the running statistics of the mixture.
    alpha
        Share of v, shape (C,).
    """

    shared: ModelState
    local: ModelState
    alpha: Tensor

    @property
    def mixture(self) -> ModelState:
        """What a client uses."""
        return ModelState(
            mixed(self.alpha, self.local.params, self.shared.params), self.local.stats
        )


def mixed(alpha: Tensor, yes: NamedTensors, no: NamedTensors) -> NamedTensors:
    """Return alpha yes + (1 - alpha) no with one alpha per client, shape (C,)."""

    def mix(a: Tensor, b: Tensor) -> Tensor:
        share = _like(alpha, a)
        return share * a + (1 - share) * b

    return {k: mix(v, no[k]) for k, v in yes.items()}


def alpha_gradient(pair: Pair, grads: NamedTensors) -> Tensor:
    """Return the derivative by alpha of the mixture's loss, whose gradients are given, (C,)."""
    apart = {k: v - pair.shared.params[k] for k, v in pair.local.params.items()}
    return inner_product(apart, grads)


def train_pair(pair: Pair, gradient: Gradient, steps: int, rate: Tensor, *, adaptive: bool) -> Pair:
    """Take the steps of one round; ``rate`` has shape (C,)."""
    names = frozenset(pair.shared.params)
    rates = {k: _like(rate, p) for k, p in pair.shared.params.items()}
    for step in range(steps):
        grads, stats = gradient(pair.shared, step, names)
        towards, mixture_stats = gradient(pair.mixture, step, names)
        own = {k: _like(rate * pair.alpha, g) for k, g in towards.items()}
        alpha = pair.alpha
        if adaptive and step == 0:
            alpha = (alpha - rate * alpha_gradient(pair, towards)).clamp(0, 1)
        pair = Pair(
            ModelState(sgd_update(pair.shared.params, rates, grads), stats),
            ModelState(sgd_update(pair.local.params, own, towards), mixture_stats),
            alpha,
        )
    return pair


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a number per client, shape (C,), ready to multiply a tensor of shape (C, ...)."""
    return value.to(tensor.dtype).view(-1, *(1,) * (tensor.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class APFL(LocalSGD):
    """Federated averaging, and a local model per client that is mixed with the global one.

    Parameters
    ----------
    alpha
        Share of the local model at first, in [0, 1].
    adaptive
        Whether clients adapt it.
    """

    alpha: float
    adaptive: bool

    @property
    def unequal_sizes(self) -> bool:
        """No: it follows a gradient of its own."""
        return False

    def train_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> RoundResult:
        """Train both models of clients of equal shapes for one round."""
        pair = self.pair(net, state, clients)
        rate = self.local.rate_in(clients[0].round)
        pair = self.trained(net, pair, clients, self.round_loop, rate, "local")
        names = tensor_names(net)
        kept = [
            kept_copies(client_tensors(net, pair.local, j, names), prefix=LOCAL)
            | {ALPHA: pair.alpha[j : j + 1].cpu().clone()}
            for j in range(len(clients))
        ]
        return RoundResult(pair.shared, kept)

    def personalize_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> PersonalModels:
        """Train both models of clients of equal shapes; they use the mixture."""
        pair = self.pair(net, state, clients)
        pair = replace(pair, local=with_fresh_statistics(net, pair.local, self.inner))
        pair = self.trained(net, pair, clients, self.inner, self.rate, "finetune")
        return PersonalModels(pair.mixture, constant_mix(net, len(clients), 1.0))

    def pair(self, net: FunctionalModel, state: State, clients: Sequence[Client]) -> Pair:
        """Return what clients have before a round."""
        shared = client_states(net, state, clients)
        local = client_states(net, {}, clients, prefix=LOCAL)
        first = torch.tensor([self.alpha], device=net.device, dtype=net.dtype)
        alpha = torch.cat([c.kept.get(ALPHA, first).to(first) for c in clients])
        return Pair(
            shared, ModelState(local.params, mixed(alpha, local.stats, shared.stats)), alpha
        )

    def trained(
        self,
        net: FunctionalModel,
        pair: Pair,
        clients: Sequence[Client],
        loop: InnerLoop,
        rate: float,
        stream: str,
    ) -> Pair:
        """Return the pair after a loop of steps on a draw of batches."""
        gradient = loss_gradient(net, clients, loop, stream)
        steps = loop.steps(clients[0].data.train.num)
        rates = constant_hyperparams(net, len(clients), mix=1.0, rate=rate).rate[:, 0]
        return train_pair(pair, gradient, steps, rates, adaptive=self.adaptive)


METHODS = {
    "apfl": lambda s: APFL(
        name="apfl",
        local=s.local,
        alpha=s.baselines.apfl_alpha,
        adaptive=s.baselines.apfl_adaptive,
        inner=s.plain_sgd_loop("apfl"),
        rate=s.personal_rate,
    )
}
