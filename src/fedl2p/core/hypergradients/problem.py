"""The bilevel problem that a hypergradient belongs to: its settings, its parts, its answer.

Shapes: C clients, B norms, P parameter tensors, K inner steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedl2p.core.finetuning.batches import Batches, Part
from fedl2p.core.finetuning.in_place_sgd import Descent
from fedl2p.core.finetuning.inner_loop import start_of
from fedl2p.core.finetuning.sgd_step import cross_entropy
from fedl2p.core.functional.model import Net, NetState
from fedl2p.core.functional.named_tensors import Members, Named, in_rows
from fedl2p.core.settings import Statistics

FEW, MANY = 12, 512
"""Validation examples per client and pass, of large models and of small ones: more would hold more
activations than training does."""


@dataclass(frozen=True)
class Hypergradient:
    """The validation loss of C clients and its gradients.

    Parameters
    ----------
    mix, rate
        Shapes (C, B) and (C, P): dL_val/dbeta and dL_val/deta, the rates being absolute ones.
    loss, accuracy
        Shape (C,): on the validation batch, before any change; nats and fraction.
    """

    mix: Tensor
    rate: Tensor
    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Problem:
    """One bilevel problem of C clients.

    Parameters
    ----------
    batches
        Of the inner steps. Where clients take unequally many they share the last one
        (``align="end"``), so that the last T steps of the stack are everybody's own last ones.
    following
        The batch after the last step.
    validation
        Validation batches, by clients whose have equal lengths.
    """

    net: Net
    mix: Tensor
    rate: Tensor
    batches: Batches
    following: tuple[Tensor, Tensor] | None
    validation: Sequence[Part]
    statistics: Statistics


def begin(problem: Problem) -> NetState:
    """Return the state in which the inner loop starts."""
    clients, steps = len(problem.mix), len(problem.batches)
    return start_of(problem.net, clients, problem.statistics, steps=steps)


def descending(problem: Problem, start: NetState) -> Descent:
    """Return the way down the inner loop without a graph."""
    return Descent(problem.net, start, problem.mix, problem.rate)


@dataclass(frozen=True)
class Validation:
    """The validation loss of C clients in evaluation mode, and its gradients.

    Parameters
    ----------
    loss, accuracy
        Shape (C,), nats and fraction.
    params, stats
        Gradients by the weights and, where asked for, by the running statistics.
    mix
        The gradient by the mix alone (the direct term), shape (C, B).
    """

    loss: Tensor
    accuracy: Tensor
    params: Named
    stats: Named
    mix: Tensor


def validated(problem: Problem, state: NetState, *, by_stats: bool = False) -> Validation:
    """Judge a state on the validation batches, some examples at a time.

    In evaluation mode examples do not see each other, so that the gradient of their mean loss is
    the mean of gradients.
    """
    leaf = state.leaves()
    stats = leaf.stats if by_stats else state.detach().stats
    mix = problem.mix.detach().clone().requires_grad_()
    wanted = {k: v for k, v in stats.items() if v.requires_grad}
    inputs = [*leaf.params.values(), *wanted.values(), mix]
    pieces: list[tuple[Members, Named]] = []
    size = MANY if problem.net.small else FEW
    for part in problem.validation:
        count = part.y.shape[1]
        scores = torch.zeros(2, len(part.y), dtype=mix.dtype, device=mix.device)
        for x, y in zip(part.x.split(size, 1), part.y.split(size, 1), strict=True):
            share = y.shape[1] / count
            with torch.enable_grad():
                own, own_mix = NetState(leaf.params, stats), mix
                if part.members is not None:
                    rows = torch.tensor(part.members, device=mix.device)
                    own, own_mix = own.take(part.members), mix.index_select(0, rows)
                logits, _ = problem.net.logits(own, own_mix, x, training=False)
                loss = cross_entropy(logits, y) * share
                # into .grad, tensor by tensor: two whole gradients at a time would be felt
                loss.sum().backward(inputs=inputs)
            right = (logits.detach().argmax(-1) == y).to(logits.dtype).mean(1) * share
            scores += torch.stack([loss.detach(), right])
        pieces.append((part.members, {"loss": scores[0], "accuracy": scores[1]}))
    judged = in_rows(pieces)
    return Validation(
        judged["loss"],
        judged["accuracy"],
        {k: _grad(v) for k, v in leaf.params.items()},
        {k: _grad(v) for k, v in wanted.items()},
        _grad(mix),
    )


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
