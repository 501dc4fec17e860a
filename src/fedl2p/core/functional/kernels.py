"""Kernels of torch that can be differentiated twice, and compared."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.backends import cudnn, mha
from torch.nn.attention import SDPBackend, sdpa_kernel

_NOT_IMPLEMENTED = re.compile(r"(?:the )?derivative for '?([\w:.]+)'? is not implemented")


class _Choice:
    """A choice of kernels, which is the process's: it holds until the last that made it is through.

    Parameters
    ----------
    make
        Makes the choice, and leaves how to take it back in the stack.
    """

    def __init__(self, make: Callable[[ExitStack], None]) -> None:
        self._make, self._lock, self._inside, self._back = make, threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._make(self._back)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._back.close()


def _plain_attention(back: ExitStack) -> None:
    back.enter_context(sdpa_kernel(SDPBackend.MATH))
    back.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
    mha.set_fastpath_enabled(False)


def _no_cudnn(back: ExitStack) -> None:
    back.callback(setattr, cudnn, "enabled", cudnn.enabled)
    cudnn.enabled = False


attention_in_plain_operations = _Choice(_plain_attention)
"""Let fused attention compute in plain operations: its kernels have no second derivative.

Those of whole layers (torch's fast path in evaluation mode) have not even a first one, and are
taken under vmap all the same."""

without_cudnn = _Choice(_no_cudnn)
"""Let a GPU compute without cuDNN.

Its recurrent layers have no second derivative, and in evaluation mode not even a first one. Its
convolutions of float32 compute in TF32, too coarse to tell whether two ways compute the same."""


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
