"""SGD without an autograd graph between steps: in place, or along a gradient function.

Shapes: C clients of a stack, P parameter tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from fedl2p.core import trees
from fedl2p.core.finetuning.batches import Batches, StackBatch, dropout_seed_of
from fedl2p.core.finetuning.optimizers import Optimizer
from fedl2p.core.finetuning.sgd_step import (
    broadcast_rates,
    gradients,
    plain_gradient,
    sgd_update,
    stepped,
    used_gradients,
)
from fedl2p.core.functional.model import BoundModel, FunctionalModel, ModelState
from fedl2p.core.functional.workspace import pure_mixes


class Gradient(Protocol):
    """The gradient that a step of :func:`sgd` follows.

    :func:`batch_gradient` is that of a batch's loss. A method that needs another one (a proximal
    term, a gradient through a step) gives its own.
    """

    def __call__(
        self, state: ModelState, step: int, trainable: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradients by name, outside of any graph, and the new running statistics.

        ``trainable`` names the parameters that change; only these have gradients.
        """


def batch_gradient(net: FunctionalModel, mix: Tensor, batches: Batches) -> Gradient:
    """Return the gradient of the training loss on the batch of each step."""
    pure = pure_mixes(mix)

    def gradient(
        state: ModelState, step: int, trainable: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        seed = dropout_seed_of(batches, step)
        return plain_gradient(
            net, state, mix, batches[step], dropout_seed=seed, trainable=trainable, pure=pure
        )

    return gradient


class InPlaceSGD:
    """SGD on a stack of C clients in tensors that are changed in place; no graph is kept.

    Enter it as a context; its tensors stay valid afterwards.

    Parameters
    ----------
    net
        The model.
    start
        The state before the first step; it is copied.
    mix, rate
        Shapes (C, B) and (C, P).
    trainable
        Names of the parameters to differentiate by; None for all.
    optimizer
        Makes directions of gradients; None for plain SGD.
    """

    def __init__(
        self,
        net: FunctionalModel,
        start: ModelState,
        mix: Tensor,
        rate: Tensor,
        *,
        trainable: Collection[str] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._net, self._mix = net, mix
        self._single = len(mix) == 1
        self._pure = None if self._single else pure_mixes(mix)
        self._names = [k for k in start.params if trainable is None or k in trainable]
        rates = broadcast_rates(rate, start.params)
        self._optimizer = optimizer
        if optimizer is not None:
            start = optimizer.start(start)
        if self._single:  # then no tensor has a client dimension until the end
            start = start.squeezed()
        self._params = {k: v.detach() for k, v in start.params.items()}
        for name in self._names:
            self._params[name] = self._params[name].clone().requires_grad_()
        self._leaves = [self._params[k] for k in self._names]
        self._one_dtype = all(t.dtype == rate.dtype for t in self._leaves)
        self._stats = {k: v.detach().clone() for k, v in start.stats.items()}
        self._moments = {k: v.detach().clone() for k, v in start.moments.items()}
        # one number each, which is what a single client has, is added fastest without dimensions
        self._rates = {k: rates[k].view(()) if self._single else rates[k] for k in self._names}
        self._bound: BoundModel | None = None
        self._open = ExitStack()

    def __enter__(self) -> InPlaceSGD:
        """Put the tensors of a single client into the model."""
        if self._single:
            self._bound = self._open.enter_context(
                self._net.bind(self._params, self._stats, self._mix.squeeze(0))
            )
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was."""
        self._stats = self._current_stats()
        self._bound = None
        self._open.close()

    def step(self, batch: StackBatch) -> None:
        """Take a step of the batch's clients."""
        self._step(batch)

    def step_and_directions(self, batch: StackBatch) -> dict[str, Tensor]:
        """Take a step of the batch's clients; return their directions, of shape (c, ...).

        A direction is what the rate is multiplied with: in plain SGD the gradient.
        """
        taken = self._step(batch)
        return {k: d.unsqueeze(0) for k, d in taken.items()} if self._single else taken

    def _step(self, batch: StackBatch) -> dict[str, Tensor]:
        """Take a step; return the directions, those of a single client without its dimension."""
        if batch.members is not None:
            return self._step_of_some(batch, batch.members)
        with torch.enable_grad():
            if self._bound is not None:
                x, y = trees.rows(batch.x, 0), trees.rows(batch.y, 0)
                logits = self._bound.logits(x, dropout_seed=batch.dropout_seed)
                loss = self._net.objective.loss_of_one(logits, y)
            else:
                logits, stats = self._net.stacked(
                    self._params,
                    self._stats,
                    self._mix,
                    batch.x,
                    training=True,
                    first_order=True,
                    pure=self._pure,
                )
                loss = self._net.objective.losses_of_many(logits, batch.y).sum()
                self._stats = {k: v.detach() for k, v in stats.items()}
            grads = (
                gradients(loss, self._leaves)
                if self._optimizer is None
                else self._directions(self._optimizer, loss)
            )
        if grads:
            with torch.no_grad():
                rates = list(self._rates.values())
                if self._one_dtype:  # one call, as torch's own optimizers do it
                    torch._foreach_addcmul_(self._leaves, rates, grads, value=-1)
                else:
                    for leaf, of_leaf, grad in zip(self._leaves, rates, grads, strict=True):
                        leaf.copy_(stepped(leaf, of_leaf, grad))
        return dict(zip(self._names, grads, strict=True))

    @torch.no_grad()
    def _directions(self, optimizer: Optimizer, loss: Tensor) -> list[Tensor]:
        """Return the directions of all leaves; zeros where the loss does not depend on one."""
        grads = used_gradients(loss, dict(zip(self._names, self._leaves, strict=True)))
        directions, self._moments = optimizer(self._params, grads, self._moments)
        return list(_completed(directions, self._names, self._params).values())

    def _step_of_some(self, batch: StackBatch, members: tuple[int, ...]) -> dict[str, Tensor]:
        """Take a step of some clients of the stack."""
        # views where the clients lie side by side, as they do where a stack is sorted by size
        first, beyond = members[0], members[0] + len(members)
        adjacent = members == tuple(range(first, beyond))
        rows = torch.tensor(members, device=self._mix.device)

        def select(tensor: Tensor) -> Tensor:
            return tensor[first:beyond] if adjacent else tensor[rows]

        before = ModelState(
            {k: select(v.detach()) for k, v in self._params.items()},
            {k: select(v) for k, v in self._stats.items()},
            {k: select(v) for k, v in self._moments.items()},
        )
        grads, stats = plain_gradient(
            self._net,
            before,
            select(self._mix),
            (batch.x, batch.y),
            dropout_seed=batch.dropout_seed,
            trainable=self._names,
            skip_unused=self._optimizer is not None,
            pure=self._pure,
        )
        with torch.no_grad():
            if self._optimizer is not None:
                directions, moments = self._optimizer(before.params, grads, before.moments)
                grads = _completed(directions, self._names, before.params)
                for name, value in moments.items():
                    self._moments[name].index_copy_(0, rows, value)
            for name, grad in grads.items():
                rate = select(self._rates[name])
                after = stepped(before.params[name], rate, grad)
                self._params[name].index_copy_(0, rows, after)
            for name, value in stats.items():  # a stacked step may have left an expanded tensor
                self._stats[name] = self._stats[name].index_copy(0, rows, value)
        return grads

    @property
    def state(self) -> ModelState:
        """The current state. Its parameters are views, which the next step changes."""
        params = {k: v.detach() for k, v in self._params.items()}
        state = ModelState(params, self._current_stats(), self._moments)
        return state.unsqueezed() if self._single else state

    def copy(self) -> ModelState:
        """Return a copy of the current state."""
        state = self.state
        return ModelState(
            {k: v.clone() for k, v in state.params.items()},
            {k: v.clone() for k, v in state.stats.items()},
            {k: v.clone() for k, v in state.moments.items()},
        )

    def _current_stats(self) -> dict[str, Tensor]:
        return self._stats if self._bound is None else self._bound.stats()


def _completed(
    directions: dict[str, Tensor], names: Collection[str], like: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the directions of all names, zeros for those without one."""
    return {k: directions[k] if k in directions else torch.zeros_like(like[k]) for k in names}


def trainable(start: ModelState, rate: Tensor) -> frozenset[str]:
    """Return the names of the parameters whose rate, of shape (C, P), is not 0 for every client."""
    changes = zip(start.params, (rate != 0).any(0).tolist(), strict=True)
    return frozenset(name for name, does in changes if does)


def sgd(start: ModelState, rate: Tensor, gradient: Gradient, steps: range) -> ModelState:
    """Return the state after SGD along a gradient function, without a graph.

    A parameter tensor whose rate, of shape (C, P), is 0 for every client stays the same tensor, and
    no gradient is computed for it.
    """
    rates, names = broadcast_rates(rate, start.params), trainable(start, rate)
    state = start.detach()
    for step in steps:
        grads, stats = gradient(state, step, names)
        state = ModelState(sgd_update(state.params, rates, grads), stats)
    return state
