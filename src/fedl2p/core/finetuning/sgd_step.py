"""One inner step: its loss, its gradients, the weights after it.

theta_{k+1} = theta_k - eta (.) grad L_train(theta_k; beta), plain SGD on a mini-batch, one learning
rate per parameter tensor (Lee et al., "FedL2P", NeurIPS 2023, section 3.1). Another optimizer puts
its direction in place of the gradient (:mod:`fedl2p.core.finetuning.optimizers`).
Shapes: C clients, b examples of a batch, B norms, P parameter tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fedl2p.core import trees
from fedl2p.core.finetuning.optimizers import Optimizer
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.trees import Tree


def broadcast_rates(rate: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rates of shape (C, P) by parameter tensor, each of shape (C, 1, ...) to broadcast."""
    return {
        name: rate[:, i].view(-1, *(1,) * (p.dim() - 1))
        for i, (name, p) in enumerate(params.items())
    }


def differentiable_gradient(
    net: FunctionalModel,
    state: ModelState,
    mix: Tensor,
    batch: tuple[Tree, Tree],
    *,
    dropout_seed: int = 0,
    skip_unused: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return gradients of the training loss by name and the new running statistics, with a graph.

    The parameters must require gradients. One client's tensors may come without the client
    dimension. Parameters that the loss does not depend on have gradients of zeros, or none if
    ``skip_unused``.
    """
    x, y = batch
    with torch.enable_grad():
        if mix.dim() > 1:
            logits, stats = net.logits(state, mix, x, training=True, dropout_seed=dropout_seed)
            loss = net.objective.losses_of_many(logits, y).sum()
        else:
            logits, stats = net.single(
                state.params, state.stats, mix, x, training=True, dropout_seed=dropout_seed
            )
            loss = net.objective.loss_of_one(logits, y)
        grads = torch.autograd.grad(
            loss,
            list(state.params.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=not skip_unused,
        )
    named = {k: g for k, g in zip(state.params, grads, strict=True) if g is not None}
    net.check_twice_differentiable(named.values())
    return named, stats


def plain_gradient(
    net: FunctionalModel,
    state: ModelState,
    mix: Tensor,
    batch: tuple[Tree, Tree],
    *,
    dropout_seed: int = 0,
    trainable: Collection[str] | None = None,
    skip_unused: bool = False,
    pure: Sequence[float | None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what :func:`differentiable_gradient` returns, outside of any graph and faster.

    ``trainable`` names the parameters to differentiate by, None for all; ``pure`` is as in
    :meth:`~fedl2p.core.functional.model.FunctionalModel.stacked`.
    """
    x, y = batch
    single = len(mix) == 1  # then no tensor has a client dimension until the end
    params, stats = (
        {k: v.detach().squeeze(0) if single else v.detach() for k, v in tensors.items()}
        for tensors in (state.params, state.stats)
    )
    names = [k for k in params if trainable is None or k in trainable]
    for name in names:
        params[name].requires_grad_()
    with torch.enable_grad():
        if single:
            logits, stats = net.single(
                params,
                stats,
                mix.squeeze(0),
                trees.rows(x, 0),
                training=True,
                dropout_seed=dropout_seed,
                first_order=True,
            )
            loss = net.objective.loss_of_one(logits, trees.rows(y, 0))
        else:
            logits, stats = net.stacked(
                params, stats, mix, x, training=True, first_order=True, pure=pure
            )
            loss = net.objective.losses_of_many(logits, y).sum()
        leaves = [params[k] for k in names]
        if skip_unused:
            named = used_gradients(loss, dict(zip(names, leaves, strict=True)))
        else:
            named = dict(zip(names, gradients(loss, leaves), strict=True))
    if single:
        named = {k: g.unsqueeze(0) for k, g in named.items()}
        stats = {k: v.unsqueeze(0) for k, v in stats.items()}
    return named, {k: v.detach() for k, v in stats.items()}


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss; zeros where it does not depend on a tensor."""
    if not tensors:
        return []
    return list(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))


def used_gradients(loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a loss by the tensors that it depends on."""
    if not tensors:
        return {}
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {k: g for k, g in zip(tensors, grads, strict=True) if g is not None}


def inner_step(
    net: FunctionalModel,
    state: ModelState,
    mix: Tensor,
    rate: Tensor,
    batch: tuple[Tree, Tree],
    *,
    optimizer: Optimizer | None = None,
    dropout_seed: int = 0,
) -> ModelState:
    """Return the state after a step, differentiable in state, mix and rate.

    The step is one of plain SGD, or of an optimizer whose moments the state has
    (``optimizer.start``). One client's tensors may come without the client dimension: mix of shape
    (B,), and so on. For a small net that saves a twentieth.
    """
    grads, stats = differentiable_gradient(
        net, state, mix, batch, dropout_seed=dropout_seed, skip_unused=optimizer is not None
    )
    moments = state.moments
    with torch.enable_grad():
        if mix.dim() > 1:
            rates = broadcast_rates(rate, state.params)
        else:
            rates = dict(zip(state.params, rate.unbind(0), strict=True))
        if optimizer is not None:
            grads, moments = optimizer(state.params, grads, moments)
        params = sgd_update(state.params, rates, grads)
    return ModelState(params, stats, moments)


def sgd_update(
    params: dict[str, Tensor], rates: dict[str, Tensor], grads: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return parameters one step further; those without a gradient are the same tensors."""
    return {k: stepped(p, rates[k], grads[k]) if k in grads else p for k, p in params.items()}


def stepped(p: Tensor, rate: Tensor, grad: Tensor) -> Tensor:
    """Return p - rate grad; computed in the rate's dtype and rounded to the parameter's."""
    if p.dtype == rate.dtype:
        return torch.addcmul(p, rate, grad, value=-1)
    return torch.addcmul(p.to(rate.dtype), rate, grad.to(rate.dtype), value=-1).to(p.dtype)
