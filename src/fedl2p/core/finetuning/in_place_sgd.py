"""Many inner steps without a graph, in tensors that are changed in place.

Shapes: C clients, P parameter tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedl2p.core.finetuning.batches import Batches, Part, noise_of
from fedl2p.core.finetuning.sgd_step import (
    cross_entropy,
    descended,
    gradients,
    per_tensor,
    plain_gradient,
    stepped,
)
from fedl2p.core.functional.model import Held, Net, NetState


class Gradient(Protocol):
    """What an inner step goes down: by default the gradient of a batch's loss.

    A method that needs another one (a proximal term, a gradient through a step) gives its own.
    """

    def __call__(
        self, state: NetState, step: int, wanted: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return gradients by name, outside of any graph, and the running statistics afterwards.

        ``wanted`` names the parameters that move; only these have gradients.
        """


def batch_gradient(net: Net, mix: Tensor, batches: Batches) -> Gradient:
    """Return the gradient of the training loss on the batch of each step."""

    def gradient(
        state: NetState, step: int, wanted: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        noise = noise_of(batches, step)
        return plain_gradient(net, state, mix, batches[step], noise=noise, wanted=wanted)

    return gradient


class Descent:
    """C clients on their way down the training loss, in tensors that are changed in place.

    Enter it as a context; its tensors stay valid afterwards.

    Parameters
    ----------
    net
        The model.
    start
        The state before the first step; it is copied.
    mix, rate
        Shapes (C, B) and (C, P).
    wanted
        Names of the parameters to differentiate by; None for all.
    """

    def __init__(
        self,
        net: Net,
        start: NetState,
        mix: Tensor,
        rate: Tensor,
        *,
        wanted: Collection[str] | None = None,
    ) -> None:
        self._net, self._mix = net, mix
        self._alone = len(mix) == 1
        self._names = [k for k in start.params if wanted is None or k in wanted]
        rates = per_tensor(rate, start.params)
        if self._alone:  # then no tensor has a client dimension until the end
            start = start.squeezed()
        self._params = {k: v.detach() for k, v in start.params.items()}
        for name in self._names:
            self._params[name] = self._params[name].clone().requires_grad_()
        self._at = [self._params[k] for k in self._names]
        self._one_dtype = all(t.dtype == rate.dtype for t in self._at)
        self._stats = {k: v.detach().clone() for k, v in start.stats.items()}
        # one number each, which is what a client alone has, is added fastest without dimensions
        self._rates = {k: rates[k].view(()) if self._alone else rates[k] for k in self._names}
        self._held: Held | None = None
        self._open = ExitStack()

    def __enter__(self) -> Descent:
        """Put the tensors of a client alone in place."""
        if self._alone:
            self._held = self._open.enter_context(
                self._net.holding(self._params, self._stats, self._mix.squeeze(0))
            )
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the net as it was."""
        self._stats = self._now()
        self._held = None
        self._open.close()

    def step(self, part: Part) -> dict[str, Tensor]:
        """Let the clients of ``part`` take a step; return their gradients, of shape (c, ...)."""
        if part.members is not None:
            return self._some(part, part.members)
        grads = self._plain(part.x, part.y, part.noise)
        if self._alone:
            grads = [g.unsqueeze(0) for g in grads]
        return dict(zip(self._names, grads, strict=True))

    def _plain(self, x: Tensor, y: Tensor, noise: int) -> list[Tensor]:
        """Take a step of all clients; return their gradients."""
        with torch.enable_grad():
            if self._held is not None:
                logits = self._held.logits(x.squeeze(0), noise=noise)
                loss = F.cross_entropy(logits, y.squeeze(0).long())
            else:
                logits, stats = self._net.stacked(
                    self._params, self._stats, self._mix, x, training=True, first_order=True
                )
                loss = cross_entropy(logits, y).sum()
                self._stats = {k: v.detach() for k, v in stats.items()}
            grads = gradients(loss, self._at)
        if grads:
            with torch.no_grad():
                rates = list(self._rates.values())
                if self._one_dtype:  # one call, as torch's own optimizers do it
                    torch._foreach_addcmul_(self._at, rates, grads, value=-1)
                else:
                    for tensor, one, grad in zip(self._at, rates, grads, strict=True):
                        tensor.copy_(stepped(tensor, one, grad))
        return grads

    def _some(self, part: Part, members: tuple[int, ...]) -> dict[str, Tensor]:
        """Take the step of some clients, in a stack of their own."""
        # views where the clients lie side by side, as they do where a stack is sorted by size
        first, beyond = members[0], members[0] + len(members)
        together = members == tuple(range(first, beyond))
        rows = torch.tensor(members, device=self._mix.device)

        def of(tensor: Tensor) -> Tensor:
            return tensor[first:beyond] if together else tensor[rows]

        own = NetState(
            {k: of(v.detach()) for k, v in self._params.items()},
            {k: of(v) for k, v in self._stats.items()},
        )
        grads, stats = plain_gradient(
            self._net, own, of(self._mix), (part.x, part.y), noise=part.noise, wanted=self._names
        )
        with torch.no_grad():
            for name, grad in grads.items():
                after = stepped(own.params[name], of(self._rates[name]), grad)
                self._params[name].index_copy_(0, rows, after)
            for name, value in stats.items():
                self._stats[name].index_copy_(0, rows, value)
        return grads

    @property
    def state(self) -> NetState:
        """The state now. Its parameters are views, which the next step changes."""
        params = {k: v.detach() for k, v in self._params.items()}
        stats = self._now()
        if self._alone:
            params = {k: v.unsqueeze(0) for k, v in params.items()}
            stats = {k: v.unsqueeze(0) for k, v in stats.items()}
        return NetState(params, stats)

    def copy(self) -> NetState:
        """Return the state now, in tensors of its own."""
        state = self.state
        return NetState(
            {k: v.clone() for k, v in state.params.items()},
            {k: v.clone() for k, v in state.stats.items()},
        )

    def _now(self) -> dict[str, Tensor]:
        return self._stats if self._held is None else self._held.stats()


def moving(start: NetState, rate: Tensor) -> frozenset[str]:
    """Return the names of the parameters whose rate, of shape (C, P), is not 0 for every client."""
    moves = zip(start.params, (rate != 0).any(0).tolist(), strict=True)
    return frozenset(name for name, does in moves if does)


def descent(start: NetState, rate: Tensor, gradient: Gradient, steps: range) -> NetState:
    """Take steps down a gradient of one's own, without a graph.

    A parameter tensor whose rate, of shape (C, P), is 0 for every client stays the same tensor, and
    no gradient is computed for it.
    """
    rates, wanted = per_tensor(rate, start.params), moving(start, rate)
    state = start.detach()
    for step in steps:
        grads, stats = gradient(state, step, wanted)
        state = NetState(descended(state.params, rates, grads), stats)
    return state
