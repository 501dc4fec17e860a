"""The mixed norm in training mode by torch's fused kernels, differentiable twice.

With batch mean mu and biased variance s2 over the N values of a channel, mix b and global
statistics (m, v), the mixed norm is

    y = (u - o) R w + c,   u = x - mu,
    o = (1 - b) (m - mu),   R = ((1 - b) v + b s2 + eps)^(-1/2),

and with T = sum g, C = sum g u and A = R (C - o T) over a channel, the backward of a gradient g is

    dx = g p + u q + r,   dw = A,   dc = T,
    p = R w,   q = -b R^2 w A / N,   r = -b R w T / N,
    db = sum over channels of  p T (m - mu) - p R A (s2 - v) / 2.

All is affine in u and g channel by channel, which evaluation-mode batch-norm computes in one pass;
the sums are what its backward computes in one pass. The double backward has the same form: its
reductions are sum(G g), sum(G u) and sum(G), where G is the gradient with respect to dx; the rest
are small formulas per channel (:func:`_double_backward`).

:class:`~fedl2p.core.functional.mixed_norm.MixedNorm` composes the same norm from plain
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

_torch_backward = torch.ops.aten.native_batch_norm_backward


def fused_mixed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor],
    mix: Tensor,
    eps: float,
    *,
    stacked: bool = False,
    first_order: bool = False,
    pure: float | None = None,
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
        Whether the call is under ``torch.func.vmap``, which costs more.
    first_order
        Whether gradients will be taken once at most, and only of y; saves time.
    pure
        The mix where it is known to be 0 or 1, for all clients of a stack, and constant: with
        ``first_order`` the backward then needs fewer passes.

    Returns
    -------
    y, mean, var
        Shapes (n, channels, ...), (channels,) and (channels,): the output, and the batch's mean and
        biased variance, outside of any graph if ``first_order``.
    """
    others: tuple[Any, ...] = eps, first_order, pure if first_order else None
    if stacked:
        y, mean, var = _stacked_norm(x, weight, bias, running, mix, *others)
    else:
        apply: Callable[..., tuple[Tensor, ...]] = _MixedNorm.apply
        y, mean, var, *_ = apply(x, weight, bias, *running, mix, *others)
    return y, mean, var


class _MixedNorm(torch.autograd.Function):
    """See the module; inputs and outputs are those of :func:`_forward`.

    The centred batch is an output too, since the backward depends on it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        first_order = inputs[-2]
        outputs = _forward(*inputs)
        visible = outputs[: 3 if first_order else 4]  # every output takes time
        _remember(ctx, inputs, outputs)
        ctx.mark_non_differentiable(*(visible[1:] if first_order else ()))
        return visible

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *grads)


def _stacked_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor],
    mix: Tensor,
    eps: float,
    first_order: bool,
    pure: float | None,
) -> tuple[Tensor, ...]:
    """Normalise the batches of a stack's clients, under vmap.

    The clients are laid side by side as channels, whose norm is one without vmap. It is computed,
    and recorded by autograd, beneath vmap: torch's own way to take a function of autograd through
    it unpacks every argument and output in Python, several times.
    """
    functorch = torch._C._functorch
    stack = functorch.peek_interpreter_stack()
    if stack is None:
        raise RuntimeError("the norm of a stack was called without torch.func.vmap")
    level, clients = stack.level(), functorch.CVmapInterpreterPtr(stack).batchSize()

    def of_clients(t: Tensor, at: int = 0) -> Tensor:
        value, dim = functorch._unwrap_batched(t, level)
        return _batched(value, dim, clients, at=at)

    popped = functorch.pop_dynamic_layer_stack()
    try:
        if functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("the norm of a stack was called under a second torch.func transform")
        x = of_clients(x, at=1)
        affine = [None if t is None else of_clients(t) for t in (weight, bias)]
        channels = x.shape[1:3]
        received = (None, None) if pure == 1 else (t.expand(channels) for t in running)
        mixes = None if pure is not None else of_clients(mix).unsqueeze(1).expand(channels)
        per_channel = (*affine, *received, mixes)
        apply: Callable[..., tuple[Tensor, ...]] = _MixedNorm.apply
        y, mean, var, *_ = apply(
            x.flatten(1, 2),
            *(None if t is None else t.flatten() for t in per_channel),
            *(eps, first_order, pure),
        )
        y, mean, var = y.unflatten(1, channels), mean.view(channels), var.view(channels)
    finally:
        functorch.push_dynamic_layer_stack(popped)
    return tuple(functorch._add_batch_dim(t, d, level) for t, d in ((y, 1), (mean, 0), (var, 0)))


class _Backward(torch.autograd.Function):
    """The backward of the norm, as a function that can itself be differentiated once.

    Of the upstream gradient g, the centred batch, and the channels' weight, mix, mean and var.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, centred: Tensor, eps: float, *channels: Any
    ) -> tuple[Tensor | None, ...]:
        c = _Channels(*channels)
        needs = True, ctx.needs_input_grad[_MIX]
        dx, dw, dc, db = _backward(g, centred, eps, c, needs)
        ctx.eps = eps
        ctx.save_for_backward(g, centred, dw, dc, *channels)
        ctx.set_materialize_grads(False)
        return dx, dw, dc, db

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fused norm was asked for a gradient of third order")
        g, centred, dw, dc, *channels = ctx.saved_tensors
        return _double_backward(g, centred, dw, dc, ctx.eps, _Channels(*channels), *grads)


class _Channels(NamedTuple):
    """What the backward needs per channel: tensors of shape (channels,), the mix perhaps ().

    Where the mix is known to be 0 or 1, what does not enter may be None: :func:`_pure_backward`
    reads none of it.
    """

    weight: Tensor | None
    mix: Tensor
    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor
    offset: Tensor
    mixed_var: Tensor


_MIX = 3 + _Channels._fields.index("mix")
"""The place of the mix among the inputs of :class:`_Backward`."""


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mix: Tensor | None,
    eps: float,
    first_order: bool,
    pure: float | None,
) -> tuple[Tensor, ...]:
    """Return y, mean, var, and for the backward the centred x, its offset, the mixed variance.

    Where ``pure`` says that the mix is 0 or 1, what does not enter may be None.
    """
    shape = -1, *(1,) * (x.dim() - 2)
    if x.device.type == "cpu":
        per_value = 1.0 / _count(x)  # tensor / int would convert the number to a tensor first
        mean = x.sum(_dims(x.dim())) * per_value
        centred = x - mean.view(shape)
        var = _sum_of_products(centred, centred) * per_value
    else:  # one kernel instead of five, and it loses no digits to a far-off mean either
        var, mean = torch.var_mean(x, _dims(x.dim()), correction=0)
        centred = x - mean.view(shape)
    if pure == 1:
        offset, _ = _constants(len(mean), mean.dtype, mean.device)
        mixed_var = var
    else:
        assert running_mean is not None and running_var is not None
        if pure == 0:
            offset, mixed_var = running_mean - mean, running_var
        else:
            assert mix is not None
            mixed_var = torch.lerp(running_var, var, mix)
            offset = torch.lerp(running_mean, mean, mix) - mean
    y, _, _ = torch.native_batch_norm(centred, weight, bias, offset, mixed_var, False, 0.0, eps)
    return y, mean, var, centred, offset, mixed_var


def _remember(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, weight, bias, running_mean, running_var, mix, eps, first_order, pure = inputs
    _, mean, var, centred, offset, mixed_var = outputs
    ctx.eps, ctx.first_order, ctx.has_bias = eps, first_order, bias is not None
    ctx.pure = pure
    c = _Channels(weight, mix, mean, var, running_mean, running_var, offset, mixed_var)
    ctx.save_for_backward(centred, *c)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any,
    g: Tensor | None,
    grad_mean: Tensor | None = None,
    grad_var: Tensor | None = None,
    grad_centred: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the norm's inputs from those of its outputs.

    That of the centred batch takes the mean for fixed; ``grad_mean`` has what goes through it.
    """
    centred, *saved = ctx.saved_tensors
    c = _Channels(*saved)
    grad_x: Tensor | None
    if not torch.is_grad_enabled() and ctx.pure is not None and g is not None:
        grad_x, dw, dc = _pure_backward(g, centred, ctx.eps, c, ctx.pure, ctx.needs_input_grad[0])
        grad_mix = None
    elif not torch.is_grad_enabled():
        g = torch.zeros_like(centred) if g is None else g
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        grad_x, dw, dc, grad_mix = _backward(
            g, centred, ctx.eps, c, needs, grad_mean=grad_mean, grad_var=grad_var
        )
        if grad_x is not None and grad_centred is not None:
            grad_x = grad_x.add_(grad_centred)
    elif ctx.first_order:
        raise RuntimeError("the fused norm was asked for a gradient of second order")
    elif g is None or not (grad_mean is None and grad_var is None and grad_centred is None):
        raise RuntimeError("the fused norm has second derivatives of its output alone")
    else:
        apply: Callable[..., tuple[Tensor, ...]] = _Backward.apply
        grad_x, dw, dc, grad_mix = apply(g, centred, ctx.eps, *c)
    grad_weight = None if c.weight is None else dw
    grad_bias = dc if ctx.has_bias else None
    return grad_x, grad_weight, grad_bias, None, None, grad_mix, None, None, None


def _pure_backward(
    g: Tensor, centred: Tensor, eps: float, c: _Channels, pure: float, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return dx, dw and dc where the mix is 1, as torch's own norm, or 0, where q and r are 0."""
    needs = needs_x, True, True
    if pure == 0:
        return _norm_backward(g, centred, c.weight, c.offset, c.mixed_var, eps, needs)
    dtype = _dtype_of_statistics(centred.dtype, centred.device)
    zero, _ = _constants(centred.shape[1], dtype, centred.device)
    inverse = torch.rsqrt(c.mixed_var.to(dtype) + eps)
    weight = _weight(c.weight, centred)
    dx, dw, dc = _torch_backward(g, centred, weight, None, None, zero, inverse, True, eps, needs)
    return dx, dw, dc


def _backward(
    g: Tensor,
    centred: Tensor,
    eps: float,
    c: _Channels,
    needs: tuple[bool, bool],
    *,
    grad_mean: Tensor | None = None,
    grad_var: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Return dx, dw, dc and db of the module's formulas; dx and db only if they are needed.

    ``grad_mean`` and ``grad_var`` are gradients of the batch's statistics, which depend on x too.
    """
    needs_x, needs_mix = needs
    # direct: g p; dw: A; dc: T
    direct, dw, dc = _norm_backward(
        g, centred, c.weight, c.offset, c.mixed_var, eps, (needs_x, True, True)
    )
    dx = db = None
    if needs_x or needs_mix:
        inverse = torch.rsqrt(c.mixed_var + eps)
        scale = inverse if c.weight is None else inverse * c.weight
    if needs_x:
        per_value = 1.0 / _count(centred)
        part = scale * (c.mix * -per_value)
        slope, constant = part * inverse * dw, part * dc
        if grad_var is not None:
            slope = torch.add(slope, grad_var, alpha=2.0 * per_value)
        if grad_mean is not None:
            constant = torch.add(constant, grad_mean, alpha=per_value)
        assert direct is not None
        dx = direct.add_(_affine(centred, slope, constant))
    if needs_mix:
        gap, spread = c.running_mean - c.mean, c.var - c.running_var
        db = (scale * (dc * gap - 0.5 * inverse * dw * spread)).sum_to_size(c.mix.shape)
    return dx, dw, dc, db


def _double_backward(
    g: Tensor,
    centred: Tensor,
    dw: Tensor,
    dc: Tensor,
    eps: float,
    c: _Channels,
    grad_dx: Tensor | None,
    grad_dw: Tensor | None,
    grad_dc: Tensor | None,
    grad_db: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of :func:`_backward` from those of its outputs.

    Of the module's letters, A is ``dw``, T is ``dc``; ``grad_a``, ``grad_t`` and ``grad_c`` are the
    gradients of A, T and C.
    """
    if grad_dx is None:
        grad_dx = torch.zeros_like(g)
    gap, spread = c.running_mean - c.mean, c.var - c.running_var
    inverse = torch.rsqrt(c.mixed_var + eps)  # R
    p = inverse if c.weight is None else inverse * c.weight
    per_value = 1.0 / _count(g)
    part = c.mix * -per_value  # -b / N
    q_per_a = part * inverse * p  # q / A
    q = q_per_a * dw
    # dx = g p + u q + r, r = part p T
    zero, one = _constants(len(dc), g.dtype, g.device)
    grad_g, grad_q, grad_r = _norm_backward(grad_dx, centred, p, zero, one, 0.0, (True, True, True))
    assert grad_g is not None
    grad_part_p = torch.addcmul(dc * grad_r, inverse * dw, grad_q)
    grad_p = torch.addcmul(_sum_of_products(grad_dx, g), part, grad_part_p)
    grad_a = q_per_a * grad_q if grad_dw is None else torch.addcmul(grad_dw, q_per_a, grad_q)
    grad_t = part * p * grad_r if grad_dc is None else torch.addcmul(grad_dc, part * p, grad_r)
    grad_log_inverse = q * grad_q  # R times the gradient by it, beyond its part in p and A
    grad_mean = grad_var = None
    if grad_db is not None:  # db = p (T gap - R A spread / 2)
        half = 0.5 * inverse * spread
        grad_p = grad_p + grad_db * (dc * gap - half * dw)
        grad_t = grad_t + grad_db * p * gap
        grad_a = grad_a - grad_db * p * half
        grad_log_inverse = grad_log_inverse - grad_db * p * half * dw
        grad_mean = -grad_db * p * dc
        grad_var = -0.5 * grad_db * p * inverse * dw
    # A = R (C - o T), p = R w
    grad_c = inverse * grad_a
    grad_t = torch.addcmul(grad_t, grad_c, c.offset, value=-1)
    grad_log_inverse = torch.addcmul(torch.addcmul(grad_log_inverse, grad_a, dw), grad_p, p)
    grad_mixed_var = inverse * inverse * grad_log_inverse * -0.5
    minus_grad_offset = grad_c * dc
    grad_mix = torch.addcmul(grad_mixed_var * spread, minus_grad_offset, gap)
    grad_mix = torch.sub(grad_mix, p * grad_part_p, alpha=per_value).sum_to_size(c.mix.shape)
    # Through the offset, (1 - b) times its gradient, less the sum of grad_centred, which takes the
    # mean for fixed: together
    through = -torch.addcmul(q * grad_r, c.mix, minus_grad_offset)
    grad_mean = through if grad_mean is None else grad_mean + through
    through = c.mix * grad_mixed_var
    grad_var = through if grad_var is None else grad_var + through
    grad_weight = None if c.weight is None else inverse * grad_p
    grad_g = grad_g.add_(_affine(centred, grad_c, grad_t))
    grad_centred = _affine(grad_dx, q, zero).add_(_affine(g, grad_c, zero))
    return (
        grad_g,
        grad_centred,
        None,
        grad_weight,
        grad_mix,
        grad_mean,
        grad_var,
        None,
        None,
        None,
        None,
    )


def _norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of evaluation-mode batch-norm, by x, weight and bias."""
    saved: tuple[Tensor | None, ...] = None, None
    if x.device.type != "cpu":  # a GPU's kernels take nothing saved as empty tensors only
        saved = _nothing_saved(_dtype_of_statistics(x.dtype, x.device), x.device)
    dx, dw, dc = _torch_backward(g, x, _weight(weight, x), mean, var, *saved, False, eps, needs)
    return dx, dw, dc


def _weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ones for a missing weight on a GPU, whose kernels return no sums without one."""
    if weight is None and x.device.type != "cpu":
        weight = _constants(x.shape[1], x.dtype, x.device)[1]
    return weight


@cache
def _dtype_of_statistics(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that torch's kernels keep a batch's statistics in."""
    narrow = device.type != "cpu" and dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow else dtype


@cache
def _nothing_saved(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=dtype, device=device)
        return empty, empty


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a times b over each channel."""
    zero, one = _constants(b.shape[1], b.dtype, b.device)
    # the gradient by the weight of a norm that leaves b as it is
    return _norm_backward(a, b, None, zero, one, 0.0, (False, True, False))[1]


def _affine(x: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """Return x times slope plus constant, both of shape (channels,), in one pass."""
    zero, one = _constants(x.shape[1], x.dtype, x.device)
    y: Tensor = torch.native_batch_norm(x, slope, constant, zero, one, False, 0.0, 0.0)[0]
    return y


@cache
def _constants(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return zeros and ones, made once: at 8 x 8 pixels making them takes measurable time."""
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
    return t if dim == at else t.movedim(dim, at)


def _count(x: Tensor) -> int:
    """Return the number of values of each channel."""
    return x.numel() // x.shape[1]
