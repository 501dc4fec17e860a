"""The mixed norm in training mode by torch's fused kernels, differentiable twice.

With batch mean mu and biased variance s2 over the N values of a channel, mix b and global
statistics (m, v), the mixed norm is

    y = (u - o) R w + c,   u = x - mu,
    o = (1 - b) (m - mu),   R = ((1 - b) v + b s2 + eps)^(-1/2),

and with T = sum g, C = sum g u and A = R (C - o T) over a channel, the way back of a gradient g is

    dx = g p + u q + r,   dw = A,   dc = T,
    p = R w,   q = -b R^2 w A / N,   r = -b R w T / N,
    db = sum over channels of  p T (m - mu) - p R A (s2 - v) / 2.

All is affine in u and g channel by channel, which evaluation-mode batch-norm computes in one pass;
the sums are what its backward computes in one pass. The way back through the way back has the same
form: its sums are those of G g, G u and G, where G belongs to dx, and what is left are small
formulas per channel (:func:`_second`).

:class:`~fedl2p.core.functional.mixed_norm.MixedBatchNorm` composes the same norm from plain
operations where this one does not apply (evaluation mode, tensors of several dtypes, a single
value per channel).

On CPU the kernel's own statistics pass (``batch_norm_update_stats``, torch 2.13) takes twice to
three times as long as the three vectorised passes here, so that on inputs that are large enough
this norm costs less than ``torch.nn.BatchNorm2d`` (``docs/performance.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

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
    once: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise a batch; differentiable twice, by x, weight, bias and mix.

    Parameters
    ----------
    x
        Shape (n, channels, ...), with more than one value per channel.
    weight, bias
        Shape (channels,), or None.
    running
        The global mean and variance, shape (channels,); constants.
    mix
        Shape ().
    eps
        Added to the variance.
    stacked
        Whether the call is under ``torch.func.vmap``; it then costs some 50 microseconds more.
    once
        Whether gradients will be taken once at most, and only of y; saves time.

    Returns
    -------
    y, mean, var
        Shapes (n, channels, ...), (channels,) and (channels,): the output, and the batch's mean and
        biased variance, outside of any graph if ``once``.
    """
    mean, var = running
    apply: Callable[..., tuple[Tensor, ...]] = (_StackedNorm if stacked else _MixedNorm).apply
    if stacked:
        mix = mix.expand_as(mean)
    y, mean, var, *_ = apply(x, weight, bias, mean, var, mix, eps, once)
    return y, mean, var


class _MixedNorm(torch.autograd.Function):
    """See the module; inputs and outputs are those of :func:`_forward`.

    The centred batch is an output too, since the way back depends on it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        once = inputs[-1]
        outputs = _forward(*inputs)
        shown = outputs[: 3 if once else 4]  # every output takes time
        _remember(ctx, inputs, outputs)
        ctx.mark_non_differentiable(*(shown[1:] if once else ()))
        return shown

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _pull_back(ctx, *grads)


class _StackedNorm(torch.autograd.Function):
    """The same with a rule for vmap, for which torch wants another form.

    The clients of a stack are laid side by side as channels, so ``mix`` has an entry per channel.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _remember(ctx, inputs, output)
        # offset and mixed_var only save computing them again: gradients go by what they are made of
        ctx.mark_non_differentiable(*output[1 if ctx.once else 4 :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _pull_back(ctx, *grads[:4])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, *others: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        clients = info.batch_size
        x = _batched(x, in_dims[0], clients, at=1)
        channels = x.shape[1:3]
        *tensors, eps, once = others
        per_channel = [
            None if t is None else _batched(t, d, clients, at=0).flatten(0, 1)
            for t, d in zip(tensors, in_dims[1:-2], strict=True)
        ]
        apply: Callable[..., tuple[Tensor, ...]] = _StackedNorm.apply
        outputs = apply(x.flatten(1, 2), *per_channel, eps, once)
        dims = (1, 0, 0, 1, 0, 0)
        return tuple(o.unflatten(d, channels) for o, d in zip(outputs, dims, strict=True)), dims


class _WayBack(torch.autograd.Function):
    """The gradients of the norm, as a function that can be differentiated once.

    Of the upstream gradient g, the centred batch, and the channels' weight, mix, mean and var.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, centred: Tensor, eps: float, *channels: Any
    ) -> tuple[Tensor | None, ...]:
        c = _Channels(*channels)
        wanted = True, ctx.needs_input_grad[_MIX]
        dx, along, total, db = _way_back(g, centred, eps, c, wanted)
        ctx.eps = eps
        ctx.save_for_backward(g, centred, along, total, *channels)
        ctx.set_materialize_grads(False)
        return dx, along, total, db

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fused norm was asked for a gradient of third order")
        g, centred, along, total, *channels = ctx.saved_tensors
        return _second(g, centred, along, total, ctx.eps, _Channels(*channels), *grads)


class _Channels(NamedTuple):
    """What the way back needs beside batches: tensors of shape (channels,), the mix perhaps ()."""

    weight: Tensor | None
    mix: Tensor
    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor
    offset: Tensor
    mixed_var: Tensor


_MIX = 3 + _Channels._fields.index("mix")
"""The place of the mix among the inputs of :class:`_WayBack`."""


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    mix: Tensor,
    eps: float,
    once: bool,
) -> tuple[Tensor, ...]:
    """Return y, mean, var; for the way back: centred x, what it is off by, the mixed variance."""
    share = 1.0 / _count(x)  # tensor / int would convert the number to a tensor first
    mean = x.sum(_dims(x.dim())) * share
    centred = x - mean.view(-1, *(1,) * (x.dim() - 2))
    var = _sum_of_products(centred, centred) * share
    mixed_var = torch.lerp(running_var, var, mix)
    offset = torch.lerp(running_mean, mean, mix) - mean
    y, _, _ = torch.native_batch_norm(centred, weight, bias, offset, mixed_var, False, 0.0, eps)
    return y, mean, var, centred, offset, mixed_var


def _remember(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, weight, bias, running_mean, running_var, mix, eps, once = inputs
    _, mean, var, centred, offset, mixed_var = outputs
    ctx.eps, ctx.once, ctx.has_bias = eps, once, bias is not None
    c = _Channels(weight, mix, mean, var, running_mean, running_var, offset, mixed_var)
    ctx.save_for_backward(centred, *c)
    ctx.set_materialize_grads(False)


def _pull_back(
    ctx: Any,
    g: Tensor | None,
    by_mean: Tensor | None = None,
    by_var: Tensor | None = None,
    by_centred: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the inputs of the norm, of those by its outputs.

    That by the centred batch holds the mean fixed; ``by_mean`` has what goes through it.
    """
    centred, *saved = ctx.saved_tensors
    c = _Channels(*saved)
    by_x: Tensor | None
    if not torch.is_grad_enabled():
        g = torch.zeros_like(centred) if g is None else g
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        by_x, along, total, by_mix = _way_back(
            g, centred, ctx.eps, c, wanted, by_mean=by_mean, by_var=by_var
        )
        if by_x is not None and by_centred is not None:
            by_x = by_x.add_(by_centred)
    elif ctx.once:
        raise RuntimeError("the fused norm was asked for a gradient of second order")
    elif g is None or not (by_mean is None and by_var is None and by_centred is None):
        raise RuntimeError("the fused norm has second derivatives of its output alone")
    else:
        apply: Callable[..., tuple[Tensor, ...]] = _WayBack.apply
        by_x, along, total, by_mix = apply(g, centred, ctx.eps, *c)
    by_weight = None if c.weight is None else along
    by_bias = total if ctx.has_bias else None
    return by_x, by_weight, by_bias, None, None, by_mix, None, None


def _way_back(
    g: Tensor,
    centred: Tensor,
    eps: float,
    c: _Channels,
    wanted: tuple[bool, bool],
    *,
    by_mean: Tensor | None = None,
    by_var: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Return dx, dw, dc and db of the module; dx and db only if ``wanted``.

    ``by_mean`` and ``by_var`` are gradients by the batch's statistics, which depend on x too.
    """
    want_x, want_mix = wanted
    # direct: g p; along: A; total: T
    direct, along, total = _backward(
        g, centred, c.weight, c.offset, c.mixed_var, None, None, False, eps, (want_x, True, True)
    )
    dx = d_mix = None
    if want_x or want_mix:
        inverse = torch.rsqrt(c.mixed_var + eps)
        scale = inverse if c.weight is None else inverse * c.weight
    if want_x:
        share = 1.0 / _count(centred)
        part = scale * (c.mix * -share)
        slope, constant = part * inverse * along, part * total
        if by_var is not None:
            slope = torch.add(slope, by_var, alpha=2.0 * share)
        if by_mean is not None:
            constant = torch.add(constant, by_mean, alpha=share)
        dx = direct.add_(_affine(centred, slope, constant))
    if want_mix:
        gap, spread = c.running_mean - c.mean, c.var - c.running_var
        d_mix = (scale * (total * gap - 0.5 * inverse * along * spread)).sum_to_size(c.mix.shape)
    return dx, along, total, d_mix


def _second(
    g: Tensor,
    centred: Tensor,
    along: Tensor,
    total: Tensor,
    eps: float,
    c: _Channels,
    by_dx: Tensor | None,
    by_dw: Tensor | None,
    by_dc: Tensor | None,
    by_db: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by what :func:`_way_back` was given, of those by what it returned.

    ``by_z`` is the gradient by z of everything that comes after; the letters are the module's.
    """
    if by_dx is None:
        by_dx = torch.zeros_like(g)
    gap, spread = c.running_mean - c.mean, c.var - c.running_var
    inverse = torch.rsqrt(c.mixed_var + eps)  # R
    p = inverse if c.weight is None else inverse * c.weight
    share = 1.0 / _count(g)
    part = c.mix * -share  # -b / N
    bend = part * inverse * p  # q = bend A
    q = bend * along
    # dx = g p + u q + r, r = part p T
    zero, one = _constants(len(total), g.dtype, g.device)
    by_g, by_q, by_r = _backward(
        by_dx, centred, p, zero, one, None, None, False, 0.0, (True, True, True)
    )
    bent = torch.addcmul(total * by_r, inverse * along, by_q)
    by_p = torch.addcmul(_sum_of_products(by_dx, g), part, bent)
    by_along = bend * by_q if by_dw is None else torch.addcmul(by_dw, bend, by_q)
    by_total = part * p * by_r if by_dc is None else torch.addcmul(by_dc, part * p, by_r)
    by_log_inverse = q * by_q  # R times the gradient by it, beyond its part in p and A
    by_mean = by_var = None
    if by_db is not None:  # db = p (T gap - R A spread / 2)
        half = 0.5 * inverse * spread
        by_p = by_p + by_db * (total * gap - half * along)
        by_total = by_total + by_db * p * gap
        by_along = by_along - by_db * p * half
        by_log_inverse = by_log_inverse - by_db * p * half * along
        by_mean = -by_db * p * total
        by_var = -0.5 * by_db * p * inverse * along
    # A = R (C - o T), p = R w
    by_products = inverse * by_along  # by C
    by_total = torch.addcmul(by_total, by_products, c.offset, value=-1)
    by_log_inverse = torch.addcmul(torch.addcmul(by_log_inverse, by_along, along), by_p, p)
    by_mixed_var = inverse * inverse * by_log_inverse * -0.5
    minus_by_offset = by_products * total
    by_mix = torch.addcmul(by_mixed_var * spread, minus_by_offset, gap)
    by_mix = torch.sub(by_mix, p * bent, alpha=share).sum_to_size(c.mix.shape)
    # Through the offset, (1 - b) times that by it, and less the sum of by_centred, which takes the
    # mean for fixed: together
    through = -torch.addcmul(q * by_r, c.mix, minus_by_offset)
    by_mean = through if by_mean is None else by_mean + through
    through = c.mix * by_mixed_var
    by_var = through if by_var is None else by_var + through
    by_weight = None if c.weight is None else inverse * by_p
    by_g = by_g.add_(_affine(centred, by_products, by_total))
    by_centred = _affine(by_dx, q, zero).add_(_affine(g, by_products, zero))
    return (
        by_g,
        by_centred,
        None,
        by_weight,
        by_mix,
        by_mean,
        by_var,
        None,
        None,
        None,
        None,
    )


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a times b over each channel."""
    zero, one = _constants(b.shape[1], b.dtype, b.device)
    # the gradient by the weight of a norm that leaves b as it is
    only = (False, True, False)
    sums: Tensor = _backward(a, b, None, zero, one, None, None, False, 0.0, only)[1]
    return sums


def _affine(x: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """Return x times slope plus constant, both of shape (channels,), in one pass."""
    zero, one = _constants(x.shape[1], x.dtype, x.device)
    y: Tensor = torch.native_batch_norm(x, slope, constant, zero, one, False, 0.0, 0.0)[0]
    return y


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
