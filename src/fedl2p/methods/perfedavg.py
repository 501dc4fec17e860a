"""Per-FedAvg (MAML): an initial model that a few steps adapt to a client.

Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A
Model-Agnostic Meta-Learning Approach", NeurIPS 2020, arXiv 2002.07948, algorithm 1. Clients
minimise f(w - alpha grad f(w)), the loss after one step (equation 3). A local step draws three
batches D, D', D'' and goes down ::

    (I - alpha Hessian(w; D'')) grad f(w~; D'),    w~ = w - alpha grad f(w; D)

by the rate beta. ``perfedavg`` is the first-order variant (FO), which leaves the Hessian out;
``perfedavg-hf`` the Hessian-free one (HF), which takes its product with v = grad f(w~; D') from two
gradients, [grad f(w + e v; D'') - grad f(w - e v; D'')] / (2 e). The server averages as in FedAvg.

Personalization is plain fine-tuning of everything, for seen and unseen clients alike.

Departures: e is delta / ||v||, so that the move has length delta whatever the size of v (the paper
fixes e); the three batches are the k-th ones of three draws of the client's data, so that the steps
are as many as FedAvg's and each draw uses all data; running statistics follow the first forward
pass of a step, at w. The paper adapts with one step of rate alpha; here clients fine-tune as many
steps as in all other methods, at the baselines' rate. alpha stays the paper's 0.01 in training: the
Hessian's term helps where alpha is below about one over its largest eigenvalue, which in the small
nets here is 50 to 200. Metrics of a round are those of the model after the look-ahead step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.in_place_sgd import Gradient
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.named_tensors import add_scaled, inner_product
from fedl2p.method import Client, State, Update
from fedl2p.methods.base.local_sgd import LocalSGD, RoundResult, loss_gradient, run_local_sgd
from fedl2p.methods.base.personalizing import constant_mix, evaluation_updates, validation_part
from fedl2p.methods.base.settings import Settings
from fedl2p.methods.base.tensor_groups import client_states

Variant = Literal["first-order", "hessian-free"]

SMALLEST = 1e-30
"""Lower bound of a gradient's norm in the finite difference."""


def through_step(
    first: Gradient,
    second: Gradient,
    third: Gradient | None,
    *,
    alpha: float,
    delta: float,
) -> Gradient:
    """Return the gradient of the loss after one look-ahead step.

    Parameters
    ----------
    first, second, third
        Gradients on the batches D, D' and D''; without the third, that of first order.
    alpha
        Rate of the look-ahead step.
    delta
        Length of the central difference for the Hessian product, over all parameters.
    """

    def gradient(
        state: ModelState, step: int, trainable: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        grads, stats = first(state, step, trainable)
        ahead, _ = second(_moved(state, grads, -alpha), step, trainable)
        if third is None:
            return ahead, stats
        e = delta / inner_product(ahead, ahead).sqrt().clamp_min(SMALLEST)
        up, _ = third(_moved(state, ahead, e), step, trainable)
        down, _ = third(_moved(state, ahead, -e), step, trainable)
        half = -alpha / (2 * e)
        return add_scaled(add_scaled(ahead, half, up), -half, down), stats

    return gradient


def _moved(state: ModelState, along: dict[str, Tensor], by: float | Tensor) -> ModelState:
    """Return the state with the parameters named in ``along`` moved; one length per client."""
    like = next(iter(along.values()))
    lengths = torch.as_tensor(by, device=like.device, dtype=like.dtype).expand(len(like))
    named = {k: state.params[k] for k in along}
    return ModelState({**state.params, **add_scaled(named, lengths, along)}, state.stats)


@dataclass(frozen=True, kw_only=True)
class PerFedAvg(LocalSGD):
    """Federated averaging of an initial model to fine-tune from.

    Parameters
    ----------
    variant
        first-order leaves the Hessian out, hessian-free takes it from finite differences.
    alpha
        Rate of the look-ahead step.
    delta
        Length of the finite difference of the Hessian-free variant.
    """

    variant: Variant
    alpha: float
    delta: float

    @property
    def unequal_sizes(self) -> bool:
        """No: it follows a gradient of its own."""
        return False

    def train_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> RoundResult:
        """Train clients of equal shapes for one round by the gradient through a look-ahead step."""
        loop = self.round_loop
        first = loss_gradient(net, clients, loop, "local")
        second = loss_gradient(net, clients, loop, "ahead")
        free = self.variant == "hessian-free"
        third = loss_gradient(net, clients, loop, "hessian") if free else None
        trained = run_local_sgd(
            net,
            client_states(net, state, clients),
            clients,
            loop,
            self.local.rate_in(clients[0].round),
            gradient=through_step(first, second, third, alpha=self.alpha, delta=self.delta),
        )
        return RoundResult(trained, [{}] * len(clients))

    def validate_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> list[Update]:
        """Evaluate the received model after one step on a training batch."""
        parts = [validation_part(c) for c in clients]
        start = client_states(net, state, clients)
        first = loss_gradient(net, clients, self.round_loop, "local")
        grads, stats = first(start, 0, start.params)
        stepped = ModelState(_moved(start, grads, -self.alpha).params, stats)
        scores = evaluate(net, stepped, constant_mix(net, len(clients), 1.0), parts)
        return evaluation_updates(clients, parts, scores)


def _perfedavg(settings: Settings, name: str, variant: Variant) -> PerFedAvg:
    given = settings.baselines
    beta = settings.local.rate if given.perfedavg_beta is None else given.perfedavg_beta
    return PerFedAvg(
        name=name,
        local=dataclasses.replace(settings.local, rate=beta),
        variant=variant,
        alpha=given.perfedavg_alpha,
        delta=given.perfedavg_delta,
        inner=settings.finetune,
        rate=settings.personal_rate,
    )


METHODS = {
    "perfedavg": lambda s: _perfedavg(s, "perfedavg", "first-order"),
    "perfedavg-hf": lambda s: _perfedavg(s, "perfedavg-hf", "hessian-free"),
}
