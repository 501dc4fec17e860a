"""How a model computes: precision and memory layout, noted on the model itself.

The note goes along when the model is copied, so that every method trains and evaluates it so. It is
not part of its weights, and personalized models do not carry it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from fedl2p.core.functional.copies import duplicate
from fedl2p.core.settings import Compute

_NOTE = "_fedl2p_compute"


def computing(model: nn.Module, compute: Compute) -> nn.Module:
    """Return a copy of a model that computes so, wherever this package trains or evaluates it."""
    noted = duplicate(model)
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
