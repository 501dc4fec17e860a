"""Private copies of a model, and the mode in which they run."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm


def duplicate(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model; its hooks and its instances' own forwards come along.

    Raises
    ------
    ValueError
        If something in the model cannot be copied.
    """
    # Tensors that a forward has left on modules (old weight_norm and spectral_norm) belong to a
    # graph, which torch does not copy.
    left: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in module.__dict__.values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, left)
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the model ({type(model).__name__}) cannot be copied by copy.deepcopy ({line}); leave "
            "out what cannot be copied, such as open files, locks or tensors kept from a forward"
        ) from error


def eager_copy(model: nn.Module) -> nn.Module:
    """Return a copy that computes as the model does, without a compiler.

    Compiled code would hold on to the tensors that it was traced with.
    """
    work = duplicate(model)
    for module in work.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
        original = module._modules.get("_orig_mod")
        if original is not None:  # what torch.compile returns
            module.__dict__["forward"] = original.__call__
        _twice_differentiable(module)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # the same gradients, in a layout that takes every operation
    return work


def _twice_differentiable(module: nn.Module) -> None:
    """Let weight norm compute in plain operations.

    The second derivative of torch's kernel is wrong (torch 2.13, gradgradcheck fails).
    """
    if isinstance(module, parametrizations._WeightNorm):
        module.__dict__["forward"] = partial(_directed, dim=module.dim)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            hook.__dict__["compute_weight"] = partial(_directed_by, hook)


def _directed(weight_g: Tensor, weight_v: Tensor, *, dim: int) -> Tensor:
    return weight_v * (weight_g / torch.norm_except_dim(weight_v, 2, dim))


def _directed_by(hook: WeightNorm, module: nn.Module) -> Tensor:
    g, v = getattr(module, f"{hook.name}_g"), getattr(module, f"{hook.name}_v")
    return _directed(g, v, dim=hook.dim)


class Modes:
    """Training and evaluation mode of a copy of a model.

    Training mode is what ``model.train()`` makes of it, an override of ``train`` included, but that
    submodules stay in evaluation mode which came so while others were in training mode. A model
    that is in evaluation mode as a whole trains as a whole.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        kept = [m for m in module.modules() if not m.training and m is not module]
        everything = len(kept) == sum(1 for _ in module.modules()) - 1 and not module.training
        self._kept = [] if everything else kept
        self._training: bool | None = None

    def set(self, training: bool) -> None:
        """Put the copy into a mode."""
        if self._training is training:
            return
        self._training = training
        self._module.train(training)
        if training:
            for module in self._kept:
                module.training = False
