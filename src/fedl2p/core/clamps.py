"""Clamps that let a gradient through: for outputs of the meta-nets that have bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clamp_straight_through(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp with gradient 1 everywhere."""
    return x.clamp(low, high).detach() + (x - x.detach())


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient is 0 where descent would lead further outside, else 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outward = ((x >= ctx.high) & (grad < 0)) | ((x <= ctx.low) & (grad > 0))
        return torch.where(outward, torch.zeros_like(grad), grad), None, None


def clamp_inward(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp with gradient 1, but 0 where a descent step would lead further outside."""
    result: Tensor = _ClampInward.apply(x, low, high)  # type: ignore[no-untyped-call]
    return result
