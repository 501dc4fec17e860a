"""Groups of a model's named tensors (head, norms), and the states of clients made of tensors.

Names are those of ``state_dict``. Groups are found by the type of their module, at any depth. The
count of batches that a batch-norm layer keeps and frozen parameters belong to no group.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.method import Client, State


def tensor_names(net: FunctionalModel) -> list[str]:
    """Return the names of all trainable parameters, running statistics and other buffers.

    Of other buffers (those of instance-norm, averages of weights) the ones that are real numbers
    and belong to ``state_dict``.
    """
    return [*net.sites.params, *_statistics(net), *_buffers(net)]


def head_tensors(net: FunctionalModel, method: str, name: str | None = None) -> frozenset[str]:
    """Return the names of the head's tensors.

    Those of the module ``name``; by default, of the linear layer that a forward pass calls last.

    Raises
    ------
    ValueError
        If the model has no trainable linear layer, or nothing else.
    """
    head = frozenset(net.head if name is None else net.tensors_in(name))
    if name is not None and not head:
        raise ValueError(
            f"head is {name!r}, but the model has no module of that name with tensors that train; "
            "give a name of model.named_modules()"
        )
    if not head or len(head) == len(net.sites.params):
        has = "nothing but its head" if head else "no linear layer that trains"
        raise ValueError(
            f"{method} parts a model into body and head (its last linear layer), but this one has "
            f"{has}; name the head by head= (baselines.head), or leave {method} out"
        )
    return head


def norm_tensors(net: FunctionalModel, method: str) -> frozenset[str]:
    """Return the names of all tensors of batch-norm layers: weights, biases and statistics.

    Layers without running statistics are included. Layer and group norms are not: they share
    nothing between the examples of a batch.

    Raises
    ------
    ValueError
        If the model has no batch-norm layer with such tensors.
    """
    norms = [m for m in net.plain.modules() if isinstance(m, _BatchNorm)]
    affine = {id(p) for norm in norms for p in norm.parameters()}
    params = {name for name, p in net.plain.named_parameters() if id(p) in affine}
    names = params.intersection(net.sites.params) | set(_statistics(net))
    if not names:
        raise ValueError(
            f"{method} treats batch-norm layers apart from the rest, but the model has none; leave "
            f"{method} out"
        )
    return frozenset(names)


def initial_tensors(net: FunctionalModel) -> State:
    """Return the net's own tensors, on the CPU."""
    return {name: net.saved[name].detach().cpu().clone() for name in tensor_names(net)}


def client_states(
    net: FunctionalModel, state: State, clients: Sequence[Client], *, prefix: str = ""
) -> ModelState:
    """Return the states of C clients: of each tensor the received, else the kept, else the net's.

    Parameters
    ----------
    net
        The model whose tensors are taken where neither is there.
    state
        Received tensors, the same for all clients.
    clients
        Their ``kept`` is read.
    prefix
        Of the names in ``kept``.
    """
    count, device, keeping = len(clients), net.device, any(c.kept for c in clients)
    tensors: State = {}
    for name in tensor_names(net):
        shared = state.get(name, net.saved[name])
        if shared.requires_grad or shared.device != device:  # to ask is faster
            shared = shared.detach().to(device)
        kept: list[Tensor | None] = []
        if keeping and name not in state:
            kept = [c.kept.get(prefix + name) for c in clients]
        if any(k is not None for k in kept):
            tensors[name] = torch.stack([shared if k is None else k.to(device) for k in kept])
        else:
            tensors[name] = shared.expand(count, *shared.shape)
    return _model_state(net, tensors)


def client_tensors(
    net: FunctionalModel, state: ModelState, client: int, names: Collection[str]
) -> State:
    """Return one client's tensors of these names, on the CPU."""
    tensors = dict(state.params)
    for name in net.sites.norms:
        tensors[f"{name}.running_mean"] = state.stats[f"{name}.client_mean"]
        tensors[f"{name}.running_var"] = state.stats[f"{name}.client_var"]
    for name in _buffers(net):
        carried = state.stats.get(name)  # missing where training never changes it
        tensors[name] = net.saved[name].expand(client + 1, *net.saved[name].shape)
        if carried is not None:
            tensors[name] = carried
    return {name: tensors[name][client].cpu() for name in names}


def kept_copies(tensors: State, *, prefix: str = "") -> State:
    """Return copies of tensors for the client to keep: a view would hold its whole stack."""
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def where(choose: Tensor, yes: ModelState, no: ModelState) -> ModelState:
    """Return each client's tensors from one of two states; ``choose`` has shape (C,), bool."""

    def select(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(choose.view(-1, *(1,) * (a.dim() - 1)), a, b)

    return ModelState(
        {k: select(v, no.params[k]) for k, v in yes.params.items()},
        {k: select(v, no.stats[k]) for k, v in yes.stats.items()},
    )


def _statistics(net: FunctionalModel) -> list[str]:
    return [f"{n}.{s}" for n in net.sites.norms for s in ("running_mean", "running_var")]


def _buffers(net: FunctionalModel) -> list[str]:
    saved = net.saved
    return [k for k in net.other_buffers if k in saved and saved[k].is_floating_point()]


def _model_state(net: FunctionalModel, tensors: State) -> ModelState:
    """Return a state of plain training, in which batch-norm goes on from the given statistics."""
    stats = {}
    for name in net.sites.norms:
        mean, var = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        stats[f"{name}.client_mean"], stats[f"{name}.client_var"] = mean, var
        stats[f"{name}.client_weight"] = var.new_ones(()).expand(len(var))
    stats |= {name: tensors[name] for name in _buffers(net)}
    return ModelState({k: tensors[k] for k in net.sites.params}, stats)
