"""The mixed norm in training mode by torch's fused kernels, for gradients of first order.

With batch mean mu and biased variance s2 over the N values of a channel, mix b and global
statistics (m, v), the mixed norm is

    y = (x - M) R w + c,   M = (1 - b) m + b mu,   R = ((1 - b) v + b s2 + eps)^(-1/2),

of which the derivative by x has, besides the direct term, those through mu and s2:

    dx = R w (g - b [sum g + (x - mu) R^2 sum g (x - M)] / N).

Both are affine in x and g channel by channel, which evaluation-mode batch-norm computes in one
pass; the two sums are what its backward computes in one pass. Nothing here can be differentiated
twice or by the mix: :class:`~fedl2p.core.mixing.MixedBatchNorm` composes the same from plain
operations where that is needed.

On CPU the kernel's own statistics pass (``batch_norm_update_stats``, torch 2.13) takes twice to
three times as long as the three vectorised passes here, so that on inputs that are large enough
this norm costs less than ``torch.nn.BatchNorm2d`` (``docs/performance.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_backward = torch.ops.aten.native_batch_norm_backward


def fused_mixed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor],
    mix: Tensor,
    eps: float,
    *,
    stacked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise a batch; differentiable once, by x, weight and bias.

    Parameters
    ----------
    x
        Shape (n, channels, ...), with more than one value per channel.
    weight, bias
        Shape (channels,), or None.
    running
        The global mean and variance, shape (channels,).
    mix
        Shape ().
    eps
        Added to the variance.
    stacked
        Whether the call is under ``torch.func.vmap``; it then costs some 50 microseconds more.

    Returns
    -------
    y, mean, var
        Shapes (n, channels, ...), (channels,) and (channels,): the output, and the batch's mean and
        biased variance, outside of any graph.
    """
    mean, var = running
    if stacked:
        apply: Callable[..., tuple[Tensor, ...]] = _StackedNorm.apply
        y, mean, var, *_ = apply(x, weight, bias, mean, var, mix.expand_as(mean), eps)
        return y, mean, var
    alone: Callable[..., tuple[Tensor, Tensor, Tensor]] = _MixedNorm.apply
    return alone(x, weight, bias, mean, var, mix, eps)


class _MixedNorm(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        mix: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, *saved = _forward(x, weight, bias, running_mean, running_var, mix, eps)
        ctx.eps, ctx.has_bias = eps, bias is not None
        ctx.save_for_backward(*saved, weight, mix)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _pull_back(ctx, grads[0])


class _StackedNorm(torch.autograd.Function):
    """The same with a rule for vmap, for which torch wants another form.

    The clients of a stack are laid side by side as channels, so ``mix`` has an entry per channel.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        mix: Tensor,
        eps: float,
    ) -> tuple[Tensor, ...]:
        return _forward(x, weight, bias, running_mean, running_var, mix, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, bias, _, _, mix, ctx.eps = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(*output[3:], weight, mix)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _pull_back(ctx, grads[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, *others: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        clients = info.batch_size
        x = _batched(x, in_dims[0], clients, at=1)
        channels = x.shape[1:3]
        per_channel = [
            None if t is None else _batched(t, d, clients, at=0).flatten(0, 1)
            for t, d in zip(others[:-1], in_dims[1:-1], strict=True)
        ]
        apply: Callable[..., tuple[Tensor, ...]] = _StackedNorm.apply
        outputs = apply(x.flatten(1, 2), *per_channel, others[-1])
        dims = (1, 0, 0, 1, 0, 0)
        return tuple(o.unflatten(d, channels) for o, d in zip(outputs, dims, strict=True)), dims


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    mix: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Return y, mean, var; for the way back: centred x, what it is off by, the mixed variance."""
    share = 1.0 / _count(x)  # tensor / int would convert the number to a tensor first
    zero, one = _constants(x.shape[1], x.dtype, x.device)
    mean = x.sum(_dims(x.dim())) * share
    centred = x - mean.view(-1, *(1,) * (x.dim() - 2))
    # sum of centred * (centred - 0) * 1 over all but the channels
    _, squares, _ = _backward(
        centred, centred, None, zero, one, None, None, False, 0.0, (False, True, False)
    )
    var = squares * share
    mixed_var = torch.lerp(running_var, var, mix)
    offset = torch.lerp(running_mean, mean, mix) - mean
    y, _, _ = torch.native_batch_norm(centred, weight, bias, offset, mixed_var, False, 0.0, eps)
    return y, mean, var, centred, offset, mixed_var


def _pull_back(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("the fused norm was asked for a gradient of second order")
    if g is None:
        return (None,) * 7
    centred, offset, mixed_var, weight, mix = ctx.saved_tensors
    by_x = ctx.needs_input_grad[0]
    # direct: g R w; along: sum g (x - M) R; total: sum g
    direct, along, total = _backward(
        g, centred, weight, offset, mixed_var, None, None, False, ctx.eps, (by_x, True, True)
    )
    if by_x:
        scale = torch.rsqrt(mixed_var + ctx.eps) * (mix * (-1.0 / _count(centred)))
        if weight is not None:
            scale = scale * weight
        zero, _ = _constants(len(offset), centred.dtype, centred.device)
        # centred * (scale R along) + scale total, in one pass: a norm, which brings the R
        indirect, _, _ = torch.native_batch_norm(
            centred, scale * along, scale * total, zero, mixed_var, False, 0.0, ctx.eps
        )
        direct = direct.add_(indirect)
    return (
        direct if by_x else None,
        None if weight is None else along,
        total if ctx.has_bias else None,
        None,
        None,
        None,
        None,
    )


@cache
def _constants(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return zeros and ones, made once: at 8 x 8 pixels that is felt."""
    with torch.inference_mode(False):
        zero = torch.zeros(channels, dtype=dtype, device=device)
        return zero, torch.ones_like(zero)


@cache
def _dims(dims: int) -> tuple[int, ...]:
    return tuple(d for d in range(dims) if d != 1)


def _batched(t: Tensor, dim: int | None, clients: int, *, at: int) -> Tensor:
    """Return ``t`` with its dimension of clients at ``at``, made by expansion if it has none."""
    if dim is None:
        return t.unsqueeze(at).expand(*t.shape[:at], clients, *t.shape[at:])
    return t.movedim(dim, at)


def _count(x: Tensor) -> int:
    """Return the number of values of each channel."""
    return x.numel() // x.shape[1]
