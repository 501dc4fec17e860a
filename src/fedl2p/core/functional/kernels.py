"""Kernels of torch that can be differentiated twice."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel

_NOT_IMPLEMENTED = re.compile(r"(?:the )?derivative for '?([\w:.]+)'? is not implemented")

_lock = threading.Lock()
_inside = 0
_chosen = ExitStack()


@contextmanager
def attention_in_plain_operations() -> Iterator[None]:
    """Let fused attention compute in plain operations: its kernels have no second derivative.

    Those of whole layers (torch's fast path in evaluation mode) have not even a first one, and are
    taken under vmap all the same.
    The choice is the process's, so that it holds until the last thread that made it is through.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _chosen.enter_context(sdpa_kernel(SDPBackend.MATH))
            _chosen.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            mha.set_fastpath_enabled(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _chosen.close()


def check_twice_differentiable(grads: Iterable[Tensor]) -> None:
    """Refuse gradients whose own derivative would leave something out.

    Torch raises only where it comes across the gap, and passes by where a function that is marked
    once_differentiable lies beside the way.

    Raises
    ------
    ValueError
        If a function of the model has no second derivative.
    """
    for node in nodes(g.grad_fn for g in grads):
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                "the model computes with a function that is marked once_differentiable, so that "
                "second derivatives would leave it out; use mode 'last-step', or another function"
            )


def nodes(ends: Iterable[Any]) -> Iterator[Any]:
    """Yield every node of the graph that ends in these."""
    seen: set[Any] = set()
    ahead = list(ends)
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead.extend(before for before, _ in node.next_functions)


def without_second_derivative(error: Exception) -> str | None:
    """Return the kernel that an error says cannot be differentiated twice; None for others."""
    said = _NOT_IMPLEMENTED.match(str(error))
    return said[1] if said else None
