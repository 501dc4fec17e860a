"""The norms, layers, parameter tensors and head of a model, found by type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

_LAYERS = (_ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm)

_UNSEEN = (NonDynamicallyQuantizableLinear,)
"""Layers that are read by the module around them, never called: their inputs cannot be seen."""


@dataclass(frozen=True)
class Sites:
    """The places of one model that a client's hyperparameters address, by name.

    Parameters
    ----------
    norms
        Batch-norm layers with running statistics (B names), in ``named_modules()`` order. A layer
        shared by several parents appears once, under its first name.
    layers
        Convolution, norm and linear layers (L names), whose input moments are profiled. The output
        projection of ``nn.MultiheadAttention`` is left out: its input is nowhere to be seen.
    params
        Trainable parameter tensors (P names), in ``named_parameters()`` order. Frozen tensors
        (``requires_grad=False``) are not listed and are never changed.
    head
        Names of the parameter tensors of the linear layer that is registered last, a subset of
        ``params``. Which one a forward pass calls last may be another, see
        :attr:`fedl2p.core.functional.model.Net.head`.
    """

    norms: tuple[str, ...]
    layers: tuple[str, ...]
    params: tuple[str, ...]
    head: tuple[str, ...]


def is_mixable_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Tell whether a module is a batch-norm layer that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) and not isinstance(module, _UNSEEN)


def check_module(model: object) -> None:
    """Raise ValueError if a model is no module."""
    if not isinstance(model, nn.Module):
        came = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"the model is {came}, but must be a torch.nn.Module")


def find_sites(model: nn.Module) -> Sites:
    """Find the places of ``model`` that hyperparameters address.

    Layers are found by type, at any depth, never by name.

    Parameters
    ----------
    model
        Any module. It is only read.

    Returns
    -------
    Sites
        ``norms`` is empty for a model without batch-norm: then only learning rates can be learned.

    Raises
    ------
    ValueError
        If ``model`` is no module, no parameter is trainable, a trainable one is complex, a layer is
        lazy and not yet initialised, or a part of the model is TorchScript.
    """
    check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"layer {name!r} is TorchScript, whose parameters cannot be replaced by those of a "
                "client; give the Python module that it was made of"
            )
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(is_lazy(tensor) for tensor in tensors):
            raise ValueError(
                f"layer {name!r} is lazy and has no shape yet; run one batch through the model "
                "first"
            )
    params = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    if not params:
        raise ValueError(
            "the model has no trainable parameter, so there is nothing to fine-tune; "
            "set requires_grad=True on those that may change"
        )
    for name, p in model.named_parameters():
        if p.requires_grad and not p.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is of {p.dtype}, but only real ones are trained; keep its "
                "real and imaginary part as two parameters, or set requires_grad=False"
            )
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    head_ids = {id(p) for p in modules[linear[-1]].parameters()} if linear else set()
    return Sites(
        norms=tuple(name for name, module in modules.items() if is_mixable_norm(module)),
        layers=tuple(name for name, module in modules.items() if _is_layer(module)),
        params=params,
        head=tuple(
            name for name, p in model.named_parameters() if id(p) in head_ids and p.requires_grad
        ),
    )
