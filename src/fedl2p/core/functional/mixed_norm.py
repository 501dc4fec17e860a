"""Batch-norm that mixes global and client statistics; putting it into a model and folding it back.

The user's layers stay the objects that they are in the working copy. A layer's running mean is
marked: whoever calls ``torch.nn.functional.batch_norm`` with it (torch's layers, subclasses of
them, a forward of one's own) gets the mixed norm. :func:`fold` writes the result into plain
batch-norm layers of another copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.functional.copies import duplicate
from fedl2p.core.functional.fused_norm import fused_mixed_norm
from fedl2p.core.functional.precision import remove_compute
from fedl2p.core.functional.recorded_objective import remove_objective

Fused = Literal["single", "stacked"]
"""How a norm in training mode runs fused: for one client, or for a stack of them under vmap."""

BatchNorm = Callable[[Tensor, Tensor | None, Tensor | None, bool, float, float], Tensor]
"""Of input, weight, bias, training, momentum, eps."""

_HALF = (torch.bfloat16, torch.float16)

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class MarkedMean(Tensor):
    """A running mean that hands every ``batch_norm`` that is called with it to ``replacement``.

    To every other function it is a plain tensor.
    """

    replacement: BatchNorm

    @classmethod
    def of(cls, mean: Tensor, replacement: BatchNorm) -> MarkedMean:
        """Mark a tensor; the memory stays shared."""
        marked: MarkedMean = torch.Tensor._make_subclass(cls, mean)
        marked.replacement = replacement
        return marked

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:  # which hands on three by position, the others by name
            x, mean, _ = args
            return mean.replacement(x, **kwargs)
        if func is torch.batch_norm:
            x, weight, bias, mean, _, training, momentum, eps, *_ = args
            if isinstance(mean, cls):
                return mean.replacement(x, weight, bias, training, momentum, eps)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class MixedNorm:
    """The mixed statistics of one batch-norm layer of a working copy.

    In training mode it normalises with ``(1 - mix) global + mix batch`` (biased batch variance) and
    updates the client's running statistics; in evaluation mode with
    ``(1 - mix) global + mix client``.

    Parameters
    ----------
    norm
        The layer, which is changed: its calls of ``batch_norm`` come here from now on. Its running
        statistics become the global ones.

    Notes
    -----
    Lee et al., "FedL2P", NeurIPS 2023, section 3.2. The client's statistics are kept as running
    sums with the weight of the data in them (``client_weight``): starting all three at zero and
    dividing by the weight gives a bias-free average (our departure, as in Adam's moments), while
    mean 0, variance 1 and weight 1 give the published average, of which 0.9^k is still the start
    after k steps. The layer's own momentum is used (PyTorch's default 0.1 is the published one); a
    layer with momentum None, PyTorch's cumulative average, takes 0.1 too.

    A batch with one value per channel has no variance: it is normalised with batch variance 0 and
    does not enter the running statistics.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        mean, var = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        self.norm = norm
        self.running_mean, self.running_var = mean, var
        self.fused: Fused | None = None
        self.first_order = False
        self.frozen = False
        """Whether training calls it with running statistics: these are the global ones then."""
        self.pure: float | None = None
        """The mix where it is known to be 0 or 1, for all clients of a stack, and first derivatives
        are enough: then torch's own batch-norm computes it, in a stack the fused norm in fewer
        passes."""
        zero = mean.new_zeros(())
        self.values = zero, torch.zeros_like(mean), torch.zeros_like(var), zero
        """The mix, and the client's running mean, running variance and their weight."""
        self._one = mean.new_ones(())
        self._momentum = 0.1 if norm.momentum is None else norm.momentum
        self._cumulative = norm.momentum is None
        norm._buffers["running_mean"] = MarkedMean.of(mean, self.batch_norm)
        plain = type(norm).forward in _FORWARDS and norm.track_running_stats
        if plain and "forward" not in norm.__dict__:
            # The same as through F.batch_norm, without its overhead and the count of batches.
            norm.__dict__["forward"] = self.forward

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn, for calls by keyword
        """Normalise ``input`` of shape (n, channels, ...) as the layer does."""
        norm = self.norm
        norm._check_input_dim(input)
        return self.batch_norm(
            input, norm.weight, norm.bias, norm.training, self._momentum, norm.eps
        )

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalise ``x`` of shape (n, channels, ...); arguments as of ``F.batch_norm``."""
        if self._cumulative:
            momentum = self._momentum
        if x.dtype in _HALF and self.running_mean.dtype == torch.float32:  # under autocast
            y = self._normalised(x.float(), weight, bias, training, momentum, eps)
            return y.to(x.dtype)
        return self._normalised(x, weight, bias, training, momentum, eps)

    def _normalised(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        alone = self.fused == "single" and self.pure is not None
        if training and alone and self._one_kind(x, weight):
            return self._pure(x, weight, bias, momentum, eps)
        if training and self._fusible(x, weight):
            y, mean, var = fused_mixed_norm(
                *(x, weight, bias, (self.running_mean, self.running_var), self.values[0], eps),
                stacked=self.fused == "stacked",
                first_order=self.first_order,
                pure=self.pure,
            )
            self._update_statistics(mean, var, x.numel() // x.shape[1], momentum)
            return y
        per_channel = (-1,) + (1,) * (x.dim() - 2)
        if training:
            mean, var, x = self._batch_statistics(x, per_channel, momentum)
            offset = mean  # what x is centred at from here on
        else:
            mean, var = self.client_statistics()
            offset = torch.zeros_like(mean)
        mix = self.values[0]
        mixed_mean = torch.lerp(self.running_mean, mean, mix)
        mixed_var = torch.lerp(self.running_var, var, mix)
        if self._only_evaluates(x, weight, training):
            return torch.batch_norm(x, weight, bias, mixed_mean, mixed_var, False, 0.0, eps, False)
        scale = torch.rsqrt(mixed_var + eps)
        shift = offset - mixed_mean
        if weight is not None:
            scale = scale * weight
        shift = shift * scale
        if bias is not None:
            shift = shift + bias
        return x * scale.to(x.dtype).view(per_channel) + shift.to(x.dtype).view(per_channel)

    def _pure(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float
    ) -> Tensor:
        """Normalise by the batch's statistics alone (mix 1), or by the global ones (mix 0).

        The client's running statistics are updated in place: they are the caller's own copies.
        """
        mix, client_mean, client_var, seen = self.values
        if self.pure == 1:
            y = torch.batch_norm(
                x, weight, bias, client_mean, client_var, True, momentum, eps, False
            )
            self.values = mix, client_mean, client_var, torch.lerp(seen, self._one, momentum)
            return y
        with torch.no_grad():
            self._batch_statistics(x, (-1,) + (1,) * (x.dim() - 2), momentum)
        return torch.batch_norm(
            x, weight, bias, self.running_mean, self.running_var, False, 0.0, eps, False
        )

    def _batch_statistics(
        self, x: Tensor, per_channel: tuple[int, ...], momentum: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update the running statistics; return the batch's mean, biased variance and centred form.

        Two passes of plain means cost half of ``torch.var_mean`` over several dimensions on CPU,
        and the centred batch is needed anyway.
        """
        mean = _channel_mean(x)
        centred = x - mean.view(per_channel)
        var = _channel_mean(centred.square())
        # norms may hold another dtype than the activations (bfloat16 inputs, float32 statistics)
        dtype = self.running_mean.dtype
        var, mean = var.to(dtype), mean.to(dtype)
        self._update_statistics(mean, var, x.numel() // x.shape[1], momentum)
        return mean, var, centred

    def _update_statistics(self, mean: Tensor, var: Tensor, count: int, momentum: float) -> None:
        """Update the client's running statistics by a batch's mean and biased variance."""
        if count > 1:
            # New tensors, never written in place: who put the old ones in keeps them.
            mix, client_mean, client_var, weight = self.values
            unbiased = var * (count / (count - 1))
            self.values = (
                mix,
                torch.lerp(client_mean, mean, momentum),
                torch.lerp(client_var, unbiased, momentum),
                torch.lerp(weight, self._one, momentum),
            )

    def _fusible(self, x: Tensor, weight: Tensor | None) -> bool:
        """Tell whether the fused norm can compute a training batch."""
        return self.fused is not None and self._one_kind(x, weight)

    def _only_evaluates(self, x: Tensor, weight: Tensor | None, training: bool) -> bool:
        """Tell whether torch's own norm will do: it has no derivative by the statistics."""
        return (
            not training
            and self.fused == "single"
            and not torch.is_grad_enabled()
            and self._one_kind(x, weight)
        )

    def _one_kind(self, x: Tensor, weight: Tensor | None) -> bool:
        """Tell whether a batch has a variance, and all tensors one dtype."""
        return (
            x.numel() > x.shape[1]
            and x.dtype == self.running_mean.dtype
            and (weight is None or x.dtype == weight.dtype)
        )

    def client_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the client's mean and variance, or the global ones if no data was seen yet."""
        unseen = self.running_mean, self.running_var
        if self.frozen:
            return unseen
        return client_statistics(*self.values[1:], unseen)

    @contextmanager
    def calls(self) -> Iterator[list[bool]]:
        """Yield a list that collects, of every call meanwhile, whether it was for training."""
        collected: list[bool] = []
        normalised = self._normalised

        def noted(x: Tensor, weight: Any, bias: Any, training: bool, *others: float) -> Tensor:
            collected.append(training)
            return normalised(x, weight, bias, training, *others)

        self.__dict__["_normalised"] = noted
        try:
            yield collected
        finally:
            del self.__dict__["_normalised"]


def _channel_mean(x: Tensor) -> Tensor:
    """Return the mean of each channel of a tensor (n, channels, ...)."""
    return x.flatten(2).mean(2).mean(0) if x.dim() > 2 else x.mean(0)


def client_statistics(
    mean: Tensor, var: Tensor, weight: Tensor, default: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Divide running sums by the weight of the data in them; ``default`` where that is zero."""
    seen = weight > 0
    safe = torch.where(seen, weight, torch.ones_like(weight)).unsqueeze(-1)
    seen = seen.unsqueeze(-1)
    return torch.where(seen, mean / safe, default[0]), torch.where(seen, var / safe, default[1])


def fold(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    mix: Mapping[str, Tensor],
    client: Mapping[str, tuple[Tensor, Tensor]],
) -> nn.Module:
    """Return a copy of the user's model with new tensors and mixed statistics.

    Parameters
    ----------
    model
        The global model, with plain batch-norm; only read.
    tensors
        New values of parameters and of buffers that training has changed, by name.
    mix
        Scalar mix of each norm layer, by name.
    client
        The client's mean and variance of each norm layer, by name, shape (channels,) each.

    Returns
    -------
    nn.Module
        An instance of the user's own class whose batch-norm layers are plain and hold
        ``(1 - mix) global + mix client``; dtype, device and training flags are those of ``model``.
    """
    folded = duplicate(model)
    remove_compute(folded)
    remove_objective(folded)
    values = {**dict(folded.named_parameters()), **dict(folded.named_buffers())}
    modules = dict(folded.named_modules())
    with torch.no_grad():
        for name, value in tensors.items():
            values[name].copy_(value)
        for name, (mean, var) in client.items():
            norm = modules[name]
            share = mix[name].to(mean.dtype)  # norms may hold another dtype than the mix
            assert isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor)
            norm.running_mean.copy_(torch.lerp(norm.running_mean, mean, share))
            norm.running_var.copy_(torch.lerp(norm.running_var, var, share))
    return folded
