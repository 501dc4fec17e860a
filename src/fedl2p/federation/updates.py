"""Updates as differences to the state that was sent: their norm, the bound on it, and rounding.

Differences are taken in float64: of two float32 weights most digits are the same, and Krum's
distances and a bound on the norm need those that are not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedl2p.method import State

Difference = dict[str, Tensor]
"""What a client wants changed, in float64, by the names of the state."""


def difference(state: State, shared: Mapping[str, Tensor]) -> Difference:
    """Return ``shared - state``, tensor by tensor; all kinds of numbers become float64."""
    return {
        name: shared[name].detach().cpu().double() - tensor.detach().cpu().double()
        for name, tensor in state.items()
    }


def moved(state: State, change: Mapping[str, Tensor]) -> State:
    """Return ``state + change`` with the dtypes and shapes of the state; integers are rounded."""
    return {
        name: like(tensor.detach().cpu().double() + change[name], tensor)
        for name, tensor in state.items()
    }


def like(value: Tensor, old: Tensor) -> Tensor:
    """Return a tensor with the dtype and shape of another; integers are rounded, not cut."""
    if not (old.is_floating_point() or old.is_complex()):
        value = value.round()
    return value.to(dtype=old.dtype).reshape(old.shape)


def norm(change: Difference) -> float:
    """Return the L2 norm over all tensors together."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in change.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clip(change: Difference, bound: float) -> bool:
    """Scale a difference in place to a norm of at most ``bound``; tell whether it was longer."""
    length = norm(change)
    if length <= bound:
        return False
    for tensor in change.values():
        tensor.mul_(bound / length)
    return True
