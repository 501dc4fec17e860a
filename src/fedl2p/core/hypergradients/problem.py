"""The bilevel problem of a stack of clients: inner training batches, outer validation loss.

Shapes: C clients, B norms, P parameter tensors, K inner steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedl2p.core import trees
from fedl2p.core.finetuning.batches import Batches, StackBatch
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD
from fedl2p.core.finetuning.inner_loop import initial_state
from fedl2p.core.finetuning.optimizers import Optimizer
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.named_tensors import Members, NamedTensors, gather_clients
from fedl2p.core.settings import Statistics
from fedl2p.core.trees import Tree

PASS_LARGE, PASS_SMALL = 12, 512
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
        Shape (C,): on the validation batch, before any change; the accuracy (metric) is NaN if the
        objective has none.
    """

    mix: Tensor
    rate: Tensor
    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One bilevel problem of C clients.

    Parameters
    ----------
    net
        The global model.
    mix, rate
        The hyperparameters, shapes (C, B) and (C, P), without a graph.
    batches
        Of the inner steps. Where clients take unequally many they share the last one
        (``align="end"``), so that the last T steps of the stack are the last ones of every client.
    validation
        Validation batches, one for each group of clients whose have equal lengths.
    statistics
        How running statistics start.
    following
        The batch after the last step; None for the last one again.
    optimizer
        Of the inner steps; None for plain SGD.
    """

    net: FunctionalModel
    mix: Tensor
    rate: Tensor
    batches: Batches
    validation: Sequence[StackBatch]
    statistics: Statistics = "corrected"
    following: tuple[Tree, Tree] | None = None
    optimizer: Optimizer | None = None

    def start(self) -> ModelState:
        """Return the state before the first inner step."""
        state = initial_state(self.net, len(self.mix), self.statistics, steps=len(self.batches))
        return state if self.optimizer is None else self.optimizer.start(state)

    def sgd(self, start: ModelState) -> InPlaceSGD:
        """Return the inner loop's SGD, without a graph."""
        return InPlaceSGD(self.net, start, self.mix, self.rate, optimizer=self.optimizer)


@dataclass(frozen=True)
class ValidationGradients:
    """The validation loss of C clients in evaluation mode, and its gradients.

    Parameters
    ----------
    loss, accuracy
        Shape (C,); the accuracy (metric) is NaN if the objective has none.
    params, stats
        Gradients by the weights and, where asked for, by the running statistics.
    mix
        The gradient by the mix alone (the direct term), shape (C, B).
    """

    loss: Tensor
    accuracy: Tensor
    params: NamedTensors
    stats: NamedTensors
    mix: Tensor


def validation_gradients(
    problem: Problem, state: ModelState, *, of_stats: bool = False
) -> ValidationGradients:
    """Return loss, accuracy and gradients of a state on the validation batches.

    Some examples at a time: in evaluation mode examples do not see each other, so that the gradient
    of their mean loss is the mean of gradients.
    """
    leaf = state.leaves()
    stats = leaf.stats if of_stats else state.detach().stats
    mix = problem.mix.detach().clone().requires_grad_()
    differentiable = {k: v for k, v in stats.items() if v.requires_grad}
    inputs = [*leaf.params.values(), *differentiable.values(), mix]
    pieces: list[tuple[Members, NamedTensors]] = []
    size = PASS_SMALL if problem.net.small else PASS_LARGE
    objective = problem.net.objective
    for batch in problem.validation:
        count = objective.count(batch.y)
        scores = torch.zeros(2, batch.clients, dtype=mix.dtype, device=mix.device)
        for x, y in zip(trees.split(batch.x, size, 1), trees.split(batch.y, size, 1), strict=True):
            share = objective.count(y) / count
            with torch.enable_grad():
                members, member_mix = ModelState(leaf.params, stats), mix
                if batch.members is not None:
                    rows = torch.tensor(batch.members, device=mix.device)
                    members = members.take(batch.members)
                    member_mix = mix.index_select(0, rows)
                logits, _ = problem.net.logits(members, member_mix, x, training=False)
                loss = objective.losses_of_many(logits, y) * share
                # into .grad, tensor by tensor: two whole gradients at a time would take more memory
                loss.sum().backward(inputs=inputs)
            with torch.no_grad():
                metric = objective.mean_metric(logits, y) * share
            scores += torch.stack([loss.detach(), metric])
        pieces.append((batch.members, {"loss": scores[0], "accuracy": scores[1]}))
    total = gather_clients(pieces)
    return ValidationGradients(
        total["loss"],
        total["accuracy"],
        {k: _grad(v) for k, v in leaf.params.items()},
        {k: _grad(v) for k, v in differentiable.items()},
        _grad(mix),
    )


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
