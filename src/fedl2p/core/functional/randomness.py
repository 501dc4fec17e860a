"""Random numbers of a forward pass: which generators it draws from, and draws that can be repeated.

Layers draw from generators of the whole process (torch's, Python's, numpy's). A pass that draws
runs under a lock, from a seed, and the generators are put back afterwards: the same seed gives the
same numbers, in threads too, and the caller's generators do not move.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_drawing = threading.RLock()
"""Held while the generators of the process are at a seed of ours."""


def _torch_state(device: torch.device) -> list[torch.Tensor]:
    state = [torch.default_generator.get_state()]
    if device.type == "cuda":
        state.append(torch.cuda.get_rng_state(device))
    return state


def _set_torch_state(device: torch.device, state: list[torch.Tensor]) -> None:
    torch.default_generator.set_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _seed_torch(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _numpy_random() -> Any:
    return sys.modules["numpy"].random


_Generator = tuple[
    Callable[[torch.device], Any],
    Callable[[torch.device, Any], None],
    Callable[[torch.device, int], None],
    Callable[[Any, Any], bool],
]
"""Of a generator: read its state, set it, seed it, compare two states."""

_GENERATORS: dict[str, _Generator] = {
    "torch": (
        _torch_state,
        _set_torch_state,
        _seed_torch,
        lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True)),
    ),
    "python": (
        lambda device: random.getstate(),
        lambda device, state: random.setstate(state),
        lambda device, seed: random.seed(seed),
        lambda a, b: bool(a == b),
    ),
    "numpy": (
        lambda device: _numpy_random().get_state(),
        lambda device, state: _numpy_random().set_state(state),
        lambda device, seed: _numpy_random().seed(seed % 2**32),
        lambda a, b: a[2:] == b[2:] and bool((a[1] == b[1]).all()),
    ),
}


def generators() -> frozenset[str]:
    """Return the names of the process-wide generators that are loaded."""
    return frozenset(name for name in _GENERATORS if name != "numpy" or "numpy" in sys.modules)


@contextmanager
def drawing_from(names: Collection[str], seed: int, device: torch.device) -> Iterator[None]:
    """Let these generators of the process begin at a seed; then put them back."""
    with _drawing:
        before = {name: _GENERATORS[name][0](device) for name in names}
        try:
            for name in names:
                _GENERATORS[name][2](device, seed)
            yield
        finally:
            for name, state in before.items():
                _GENERATORS[name][1](device, state)


@contextmanager
def watched(device: torch.device) -> Iterator[set[str]]:
    """Yield a set that holds afterwards which generators were drawn from; these are put back."""
    drawn: set[str] = set()
    names = generators()
    with drawing_from(names, 0, device):
        before = {name: _GENERATORS[name][0](device) for name in names}
        yield drawn
        for name, state in before.items():
            read, _, _, equal = _GENERATORS[name]
            if not equal(read(device), state):
                drawn.add(name)
