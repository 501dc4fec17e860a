"""Updates as differences to the state that was sent, and the bound on their norm.

Differences are taken in float64: of two float32 weights most digits are the same, and Krum's
distances and a bound on the norm need those that are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.supercore.differential_privacy import adaptive_clip_inputs_inplace, get_norm

from fedl2p.federation.server.replies import Reply
from fedl2p.method import State

Difference = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
"""What a client wants changed, in float64, by the names of the state."""


def difference(state: State, shared: Mapping[str, torch.Tensor]) -> Difference:
    """Return ``shared - state``, tensor by tensor; all kinds of numbers become float64."""
    return {
        name: (shared[name].detach().cpu().double() - tensor.detach().cpu().double()).numpy()
        for name, tensor in state.items()
    }


def moved(state: State, change: Mapping[str, np.ndarray[Any, Any]]) -> State:
    """Return ``state + change`` with the dtypes and shapes of the state; integers are rounded."""
    return {
        name: like(
            tensor.detach().cpu().double() + torch.from_numpy(np.asarray(change[name])), tensor
        )
        for name, tensor in state.items()
    }


def like(value: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the dtype and shape of another; integers are rounded, not cut."""
    if not (old.is_floating_point() or old.is_complex()):
        value = value.round()
    return value.to(dtype=old.dtype).reshape(old.shape)


def norm(change: Difference) -> float:
    """Return the L2 norm over all tensors together."""
    return get_norm(list(change.values()))


def clip(change: Difference, bound: float) -> bool:
    """Shorten a difference in place to a norm of at most ``bound``; tell whether it was so long.

    Flower's own function, but for a difference of nothing, by whose norm it would divide.
    """
    return norm(change) > 0 and adaptive_clip_inputs_inplace(list(change.values()), bound)


def clipped(state: State, replies: Sequence[Reply], bound: float) -> list[Reply]:
    """Return the replies with updates of at most that norm.

    Parameters
    ----------
    state
        The state that was sent.
    replies
        Checked answers.
    bound
        Largest L2 norm of ``shared - state`` over all tensors together; 0 for the median norm of
        these replies.
    """
    changes = [difference(state, reply.shared) for reply in replies]
    largest = bound or median(map(norm, changes))
    return [
        dataclasses.replace(reply, shared=moved(state, change)) if clip(change, largest) else reply
        for reply, change in zip(replies, changes, strict=True)
    ]
