"""Batch-norm that mixes global and client statistics; putting it into a model and folding it back.

A model is copied, every batch-norm layer of the copy is replaced by :class:`MixedBatchNorm`, the
copy is fine-tuned, and :func:`fold` writes the result into plain batch-norm layers of another copy.
The user's model is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.functional.fused_norm import fused_mixed_norm
from fedl2p.core.functional.precision import remove_compute
from fedl2p.core.sites import check_norms, is_mixable_norm

Fused = Literal["single", "stacked"]
"""How a norm in training mode runs fused: for one client, or for a stack of them under vmap."""

_HALF = (torch.bfloat16, torch.float16)

_EXPECTED_DIMS = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,)}


class MixedBatchNorm(nn.Module):
    """Batch-norm whose statistics are a mix of the global model's and the client's.

    In training mode it normalises with ``(1 - mix) global + mix batch`` (biased batch variance) and
    updates the client's running statistics; in evaluation mode with
    ``(1 - mix) global + mix client``.

    Parameters
    ----------
    norm
        The batch-norm layer that it stands for. Its affine parameters are shared, its running
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

    mix: Tensor
    running_mean: Tensor
    running_var: Tensor
    client_mean: Tensor
    client_var: Tensor
    client_weight: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.kind = type(norm).__name__
        self.fused: Fused | None = None
        self.first_order = False
        self.eps = norm.eps
        self.momentum = 0.1 if norm.momentum is None else norm.momentum
        self.num_features = norm.num_features
        self.weight = norm.weight
        self.bias = norm.bias
        mean, var = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("mix", mean.new_zeros(()))
        self.register_buffer("client_mean", torch.zeros_like(mean))
        self.register_buffer("client_var", torch.zeros_like(var))
        self.register_buffer("client_weight", mean.new_zeros(()))

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn, for calls by keyword
        """Normalise ``input`` of shape (n, channels, ...)."""
        x = input
        expected = _EXPECTED_DIMS.get(self.kind)
        if expected is not None and x.dim() not in expected:
            raise ValueError(
                f"{self.kind} expects {' or '.join(f'{d}-d' for d in expected)} input, "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype in _HALF and self.running_mean.dtype == torch.float32:  # under autocast
            return self._normalised(x.float()).to(x.dtype)
        return self._normalised(x)

    def _normalised(self, x: Tensor) -> Tensor:
        if self._fusible(x):
            return self._fused(x)
        per_channel = (-1,) + (1,) * (x.dim() - 2)
        if self.training:
            mean, var, x = self._batch_statistics(x, per_channel)
            offset = mean  # what x is centred at from here on
        else:
            mean, var = self.client_statistics()
            offset = torch.zeros_like(mean)
        scale = torch.rsqrt(torch.lerp(self.running_var, var, self.mix) + self.eps)
        shift = offset - torch.lerp(self.running_mean, mean, self.mix)
        if self.weight is not None:
            scale = scale * self.weight
        shift = shift * scale
        if self.bias is not None:
            shift = shift + self.bias
        return x * scale.to(x.dtype).view(per_channel) + shift.to(x.dtype).view(per_channel)

    def _batch_statistics(
        self, x: Tensor, per_channel: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update the running statistics; return the batch's mean, biased variance and centred form.

        Two passes of plain means cost half of ``torch.var_mean`` over several dimensions on CPU,
        and the centred batch is needed anyway.
        """
        mean = _channel_mean(x)
        centred = x - mean.view(per_channel)
        var = _channel_mean(centred.square())
        # norms may hold another dtype than the activations (bfloat16 inputs, float32 statistics)
        var, mean = var.to(self.client_var.dtype), mean.to(self.client_mean.dtype)
        self._update_statistics(mean, var, x.numel() // x.shape[1])
        return mean, var, centred

    def _update_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Update the client's running statistics by a batch's mean and biased variance."""
        if count > 1:
            # Assigned, never written in place: whoever put the buffers in (FunctionalModel,
            # torch.func.functional_call) finds the new ones there and keeps the old ones.
            values = self._buffers  # not as attributes, whose look-up costs time in small nets
            m, unbiased = self.momentum, var * (count / (count - 1))
            client_mean, client_var, weight = (
                values["client_mean"],
                values["client_var"],
                values["client_weight"],
            )
            assert client_mean is not None and client_var is not None and weight is not None
            values["client_mean"] = torch.lerp(client_mean, mean, m)
            values["client_var"] = torch.lerp(client_var, unbiased, m)
            values["client_weight"] = torch.lerp(weight, torch.ones_like(weight), m)

    def _fusible(self, x: Tensor) -> bool:
        """Tell whether the fused norm can compute this batch."""
        return (
            self.fused is not None
            and self.training
            and x.numel() > x.shape[1]
            and x.dtype == self.running_mean.dtype
            and (self.weight is None or x.dtype == self.weight.dtype)
        )

    def _fused(self, x: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var)
        y, mean, var = fused_mixed_norm(
            *(x, self.weight, self.bias, running, self.mix, self.eps),
            stacked=self.fused == "stacked",
            first_order=self.first_order,
        )
        self._update_statistics(mean, var, x.numel() // x.shape[1])
        return y

    def client_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the client's mean and variance, or the global ones if no data was seen yet."""
        return client_statistics(
            self.client_mean,
            self.client_var,
            self.client_weight,
            (self.running_mean, self.running_var),
        )


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


def with_mixed_norms(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which every norm site is a :class:`MixedBatchNorm`.

    Shared layers stay shared. Parameter names do not change.

    Raises
    ------
    ValueError
        If a batch-norm layer has a forward of its own, see
        :func:`~fedl2p.core.sites.check_norms`.
    """
    check_norms(model)
    work = copy.deepcopy(model)
    if is_mixable_norm(work):
        return MixedBatchNorm(work)
    made: dict[int, MixedBatchNorm] = {}
    for module in list(work.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and is_mixable_norm(child):
                # by id: a layer that several parents share must be one layer in the copy too
                module._modules[name] = made.setdefault(id(child), MixedBatchNorm(child))
    return work


def fold(
    model: nn.Module,
    params: Mapping[str, Tensor],
    mix: Mapping[str, Tensor],
    client: Mapping[str, tuple[Tensor, Tensor]],
) -> nn.Module:
    """Return a copy of the user's model with new parameters and mixed statistics.

    Parameters
    ----------
    model
        The global model, with plain batch-norm; only read.
    params
        New values of the trainable parameter tensors, by name.
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
    folded = copy.deepcopy(model)
    remove_compute(folded)
    values = dict(folded.named_parameters())
    modules = dict(folded.named_modules())
    with torch.no_grad():
        for name, value in params.items():
            values[name].copy_(value)
        for name, (mean, var) in client.items():
            norm = modules[name]
            share = mix[name].to(mean.dtype)  # norms may hold another dtype than the mix
            assert isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor)
            norm.running_mean.copy_(torch.lerp(norm.running_mean, mean, share))
            norm.running_var.copy_(torch.lerp(norm.running_var, var, share))
    return folded
