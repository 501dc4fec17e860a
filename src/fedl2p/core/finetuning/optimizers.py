"""The optimizers of the inner loop: from the gradient to the direction of a step.

A step is theta_{k+1} = theta_k - eta (.) d_k with the learned rates eta, one per parameter tensor.
The direction d_k is the gradient itself in plain SGD, which has no optimizer here (None).
Otherwise g_k is the gradient plus lambda theta_k (weight decay as an L2 term, coupled, also in
Adam), and

- SGD with momentum mu, as torch.optim.SGD without dampening and Nesterov's variant:
  m <- mu m + g_k, d_k = m;
- Adam (Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1), as
  torch.optim.Adam with its default betas and epsilon: m <- b1 m + (1 - b1) g_k,
  v <- b2 v + (1 - b2) g_k^2, d_k = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) at a client's
  t-th step.

As in torch.optim, a tensor that the loss does not depend on stays as it is. Only trainable tensors
decay; running statistics never do. Unlike there, moments of tensors in half precision are float32:
Adam's epsilon is 0 in float16.

Every operation is differentiable, at v = 0 too, where sqrt alone is not: v is 0 only where every
gradient so far was 0, hence m = 0 there, the term of d' that goes through sqrt(v) tends to 0 and
d' = m' / (1 - b1^t) / eps. So the derivative of sqrt at 0 counts as 0, which gives that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedl2p.core.functional.model import ModelState
from fedl2p.core.functional.named_tensors import NamedTensors
from fedl2p.core.settings import InnerLoop

STEPS = ".steps"
"""Name of the number of a client's steps among the moments, int64."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """A direction from gradients and from moments that go on from step to step.

    Parameters
    ----------
    weight_decay
        lambda, the factor on the weights in the gradient.
    """

    weight_decay: float = 0.0

    @property
    @abstractmethod
    def moments(self) -> tuple[str, ...]:
        """The names of the moments of each parameter tensor."""

    def start(self, state: ModelState) -> ModelState:
        """Return a state of C clients with moments of zeros, or with those that it has."""
        if state.moments or not self.moments:
            return state
        zeros = {
            _name(moment, k): torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for moment in self.moments
            for k, p in state.params.items()
        }
        first = next(iter(state.params.values()))
        zeros[STEPS] = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        return ModelState(state.params, state.stats, zeros)

    def __call__(
        self, params: NamedTensors, grads: NamedTensors, moments: NamedTensors
    ) -> tuple[NamedTensors, NamedTensors]:
        """Return the directions of the tensors that have a gradient, and the new moments.

        The moments given are not changed. One client's tensors may come without the client
        dimension.
        """
        new = dict(moments)
        if self.moments:
            new[STEPS] = moments[STEPS] + 1
        directions = {}
        for k, grad in grads.items():
            if self.weight_decay:
                grad = torch.add(grad, params[k], alpha=self.weight_decay)
            before = [moments[_name(moment, k)] for moment in self.moments]
            wide = grad.to(before[0].dtype) if before else grad
            directions[k], after = self._direction(wide, before, new.get(STEPS))
            new.update((_name(moment, k), t) for moment, t in zip(self.moments, after, strict=True))
        return directions, new

    @abstractmethod
    def _direction(
        self, grad: Tensor, moments: list[Tensor], steps: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the direction of a tensor and its new moments."""


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """SGD with momentum or weight decay.

    Parameters
    ----------
    momentum
        mu, in [0, 1).
    """

    momentum: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        """The momentum buffer m, if there is any momentum."""
        return ("momentum",) if self.momentum else ()

    def _direction(
        self, grad: Tensor, moments: list[Tensor], steps: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        if not self.momentum:
            return grad, []
        buffer = torch.add(grad, moments[0], alpha=self.momentum)
        return buffer, [buffer]


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam with torch's default betas and epsilon."""

    @property
    def moments(self) -> tuple[str, ...]:
        """The first and the second moment, m and v."""
        return ("first", "second")

    def _direction(
        self, grad: Tensor, moments: list[Tensor], steps: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        assert steps is not None
        first = moments[0].lerp(grad, 1 - BETAS[0])
        second = torch.addcmul(BETAS[1] * moments[1], grad, grad, value=1 - BETAS[1])
        mean = first / _bias(BETAS[0], steps, grad)
        root = _sqrt(second / _bias(BETAS[1], steps, grad))
        return mean / (root + EPSILON), [first, second]


BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam, torch's defaults."""


def optimizer_of(inner: InnerLoop) -> Optimizer | None:
    """Return the optimizer of an inner loop; None for plain SGD."""
    if inner.optimizer == "adam":
        return Adam(weight_decay=inner.weight_decay)
    if inner.plain_sgd:
        return None
    return SGD(momentum=inner.momentum, weight_decay=inner.weight_decay)


def _name(moment: str, parameter: str) -> str:
    return f".{moment}.{parameter}"  # no parameter's name begins with a dot


def _bias(beta: float, steps: Tensor, like: Tensor) -> Tensor:
    """Return 1 - beta^t of each client, ready to divide a tensor like ``like``."""
    bias = (1 - beta ** steps.double()).to(like.dtype)  # exact where beta^t is near 1
    return bias.view(-1, *(1,) * (like.dim() - 1)) if bias.dim() else bias


def _sqrt(values: Tensor) -> Tensor:
    """Return the square root, with derivative 0 at 0."""
    if not values.requires_grad:
        return values.sqrt()
    zero = values == 0
    return values.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
