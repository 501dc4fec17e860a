"""How a model computes: precision and memory layout, noted on the model itself.

The note goes along when the model is copied, so that every method trains and evaluates it so. It is
not part of its weights, and personalized models do not carry it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from fedl2p.core.settings import Compute

_NOTE = "_fedl2p_compute"


def computing(model: nn.Module, compute: Compute) -> nn.Module:
    """Return a copy of a model that computes so, wherever this package trains or evaluates it."""
    noted = copy.deepcopy(model)
    if compute == Compute():
        noted.__dict__.pop(_NOTE, None)
        return noted
    if compute.channels_last:
        # not nn.Module.to, which fails on the weights of 3-d convolutions
        for p in noted.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
    noted.__dict__[_NOTE] = compute
    return noted


Work = Callable[[], list[Tensor]]
"""Reads and writes tensors that stay where they are, and returns tensors."""

Recorder = Callable[[Work], tuple[Callable[[], None], list[Tensor]]]
"""Makes of work a replay that does it again, and the tensors that each replay fills.

To make it, the work may be done any number of times.
"""


def record_cuda(work: Work) -> tuple[Callable[[], None], list[Tensor]]:
    """Record work as a CUDA graph."""
    # Three times before it is captured, on a stream of its own, as torch's notes on CUDA graphs ask
    # for: what libraries allocate at first must not be part of the graph.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = work()
    return graph.replay, filled


def recorder_of(compute: Compute, device: torch.device) -> Recorder | None:
    """Return what records inner steps, None where they are not to be.

    Raises
    ------
    ValueError
        If they are to be, on a device that is no GPU.
    """
    if not compute.graphs:
        return None
    if device.type != "cuda":
        raise ValueError(
            f"compute.graphs is for CUDA, but the device is {device.type}; leave it out, or use "
            "device cuda"
        )
    return record_cuda


def compute_of(model: nn.Module) -> Compute:
    """Return how a model computes."""
    return cast(Compute, model.__dict__.get(_NOTE, Compute()))


def forget(model: nn.Module) -> None:
    """Take the note off a model that leaves this package."""
    model.__dict__.pop(_NOTE, None)


def autocast(compute: Compute, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a model computes so."""
    if compute.precision == "full":
        return nullcontext()
    # without its cache of cast weights, which outlives a step
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
