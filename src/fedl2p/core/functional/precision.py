"""Precision and memory layout of a model's computations, recorded on the model itself.

The record goes along when the model is copied, so that every method trains and evaluates it so. It
is not part of the weights, and personalized models do not carry it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from fedl2p.core.functional.copies import duplicate
from fedl2p.core.settings import Compute

_ATTRIBUTE = "_fedl2p_compute"


def with_compute(model: nn.Module, compute: Compute) -> nn.Module:
    """Return a copy of a model that this package trains and evaluates under these settings."""
    copied = duplicate(model)
    if compute == Compute():
        copied.__dict__.pop(_ATTRIBUTE, None)
        return copied
    if compute.channels_last:
        # not nn.Module.to, which fails on the weights of 3-d convolutions
        for p in copied.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
    copied.__dict__[_ATTRIBUTE] = compute
    return copied


def compute_of(model: nn.Module) -> Compute:
    """Return the settings that are recorded on a model."""
    return cast(Compute, model.__dict__.get(_ATTRIBUTE, Compute()))


def remove_compute(model: nn.Module) -> None:
    """Remove the record from a model that leaves this package."""
    model.__dict__.pop(_ATTRIBUTE, None)


def autocast(compute: Compute, device: torch.device) -> AbstractContextManager[object]:
    """Return torch.autocast for a reduced precision, else a context that does nothing."""
    if compute.precision == "full":
        return nullcontext()
    # without its cache of cast weights, which outlives a step
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
