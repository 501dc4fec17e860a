"""Plain torch on the user's own model: what the package is held against.

Nothing here comes from the package but the seeds and the order of the batches.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fedl2p.seeds import derive_seed

Batch = tuple[Tensor, Tensor]


class MixedStatistics(TorchFunctionMode):
    """Lets ``batch_norm`` mix statistics, in plain operations, whoever calls it.

    The client's running sums start empty; in evaluation mode they are divided by their weight.
    """

    def __init__(self, model: nn.Module, mix: Mapping[str, float | Tensor]) -> None:
        super().__init__()
        self.names = {
            id(m.running_mean): name
            for name, m in model.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None
        }
        self.mix = mix
        self.sums: dict[str, tuple[Tensor, Tensor, float]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        return self.mixed(*args, **kwargs)

    def mixed(
        self, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ) -> Tensor:
        name = self.names[id(mean)]
        dims = [d for d in range(x.dim()) if d != 1]
        at, ut, beta = mean, var, self.mix[name]
        if training:
            m, v = x.mean(dims), x.var(dims, unbiased=False)
            count = x.numel() // x.shape[1]
            a, b, w = self.sums.get(name, (0.0, 0.0, 0.0))
            self.sums[name] = (
                (1 - momentum) * a + momentum * m,
                (1 - momentum) * b + momentum * v * count / (count - 1),
                (1 - momentum) * w + momentum,
            )
        elif name in self.sums:
            a, b, w = self.sums[name]
            m, v = a / w, b / w
        else:
            m, v = mean, var
        at, ut = (1 - beta) * mean + beta * m, (1 - beta) * var + beta * v
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = (x - at.view(shape)) / (ut.view(shape) + eps).sqrt()
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)


class FrozenStatistics(TorchFunctionMode):
    """Lets ``batch_norm`` use the running statistics, in training too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias")
            given = {**dict(zip((*names, "training", "momentum", "eps"), args, strict=False))}
            return func(**{**given, **kwargs, "training": False})
        return func(*args, **kwargs)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let every generator of the process begin at a seed; then put it back."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def to_training(model: nn.Module) -> nn.Module:
    """Put a model into training mode, but for what was put into evaluation mode alone."""
    frozen = [m for m in model.modules() if not m.training] if model.training else []
    model.train()
    for module in frozen:
        module.training = False
    return model


def noise(step: int, *seeds: int) -> int:
    """Return the seed of a step's random numbers."""
    return derive_seed("noise", *seeds, step)


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    rates: Mapping[str, float],
    *,
    seeds: tuple[int, ...] = (),
) -> nn.Module:
    """Train a copy of the model by plain SGD; batches are (x, y) of one client."""
    model = to_training(copied(model))
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for step, (x, y) in enumerate(batches):
        x = x.to(dtype) if x.is_floating_point() else x
        with drawing_from(noise(step, *seeds)):
            logits = model(x)
        loss = F.cross_entropy(logits.double(), y)
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        with torch.no_grad():
            for (name, p), grad in zip(params.items(), grads, strict=True):
                if grad is not None:
                    p.copy_(p - rates[name] * grad)
    return model


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of the model that runs without a compiler."""
    copy_of = copy.deepcopy(getattr(model, "_orig_mod", model))
    for module in copy_of.modules():
        module._compiled_call_impl = None
    return copy_of
