"""The norms, layers, parameter tensors and head of a model, found by type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

_LAYERS = (_ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm)
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


@dataclass(frozen=True)
class Sites:
    """The places of one model that a client's hyperparameters address, by name.

    Parameters
    ----------
    norms
        Batch-norm layers with running statistics (B names), in ``named_modules()`` order. A layer
        shared by several parents appears once, under its first name.
    layers
        Convolution, norm and linear layers (L names), whose input moments are profiled.
    params
        Trainable parameter tensors (P names), in ``named_parameters()`` order. Frozen tensors
        (``requires_grad=False``) are not listed and are never changed.
    head
        Names of the parameter tensors of the last linear layer, a subset of ``params``.
    """

    norms: tuple[str, ...]
    layers: tuple[str, ...]
    params: tuple[str, ...]
    head: tuple[str, ...]


def is_mixable_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Tell whether a module is a batch-norm layer that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def check_norms(model: nn.Module) -> None:
    """Refuse batch-norm layers whose forward is not torch's: mixing would drop it.

    Raises
    ------
    ValueError
        If a layer's class is derived from torch's batch-norm and overrides its forward.
    """
    for name, module in model.named_modules():
        if is_mixable_norm(module) and type(module).forward not in _FORWARDS:
            raise ValueError(
                f"norm layer {name!r} is a {type(module).__name__}, a batch-norm with a forward of "
                "its own, which mixing statistics would drop; use torch.nn's batch-norm and put "
                "the rest into a layer of its own"
            )


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
        If no parameter is trainable, if a layer is lazy and not yet initialised, or if a
        batch-norm layer has a forward of its own (see :func:`check_norms`).
    """
    for name, module in model.named_modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(is_lazy(tensor) for tensor in tensors):
            raise ValueError(
                f"layer {name!r} is lazy and has no shape yet; run one batch through the model "
                "first"
            )
    check_norms(model)
    params = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    if not params:
        raise ValueError(
            "the model has no trainable parameter, so there is nothing to fine-tune; "
            "set requires_grad=True on those that may change"
        )
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    head_ids = {id(p) for p in modules[linear[-1]].parameters()} if linear else set()
    return Sites(
        norms=tuple(name for name, module in modules.items() if is_mixable_norm(module)),
        layers=tuple(name for name, module in modules.items() if isinstance(module, _LAYERS)),
        params=params,
        head=tuple(
            name for name, p in model.named_parameters() if id(p) in head_ids and p.requires_grad
        ),
    )
