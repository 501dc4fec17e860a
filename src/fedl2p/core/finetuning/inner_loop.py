"""The inner loop: fine-tuning under given hyperparameters.

The steps are those of :mod:`fedl2p.core.finetuning.sgd_step` (Lee et al., "FedL2P", NeurIPS 2023,
section 3.1). Shapes: C clients, B norms, P parameter tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData
from fedl2p.core.data_check import check_examples
from fedl2p.core.finetuning.batches import Align, Batches, EpochBatches, step_batches
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD, trainable
from fedl2p.core.finetuning.optimizers import Optimizer, optimizer_of
from fedl2p.core.finetuning.stacking import fewest_to_stack
from fedl2p.core.functional.mixed_norm import fold
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.named_tensors import norms_within
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.objective import Loss, Pick, objective
from fedl2p.core.settings import InnerLoop, InnerOptimizer, Statistics


class DivergedError(ArithmeticError):
    """Fine-tuning ended in values that are not finite."""


def initial_state(
    net: FunctionalModel, clients: int, statistics: Statistics, *, steps: int
) -> ModelState:
    """Return the state before the first inner step.

    Without any step the client's statistics are the global ones, since no data will enter them: a
    model that is not fine-tuned stays as it is, also under ``published`` statistics.
    """
    return net.start(clients, statistics if steps else "global")


def run_inner_loop(
    net: FunctionalModel,
    hyperparams: Hyperparams,
    batches: Batches,
    *,
    statistics: Statistics,
    start: ModelState | None = None,
    optimizer: Optimizer | None = None,
) -> ModelState:
    """Fine-tune C clients from the global model (or ``start``), without a graph.

    By plain SGD, or by an optimizer, which goes on with the moments of ``start`` if it has some.
    """
    mix, rate = hyperparams.mix.detach(), hyperparams.rate.detach()
    if start is None:
        start = initial_state(net, len(mix), statistics, steps=len(batches))
    names = trainable(start, rate)
    with InPlaceSGD(net, start, mix, rate, trainable=names, optimizer=optimizer) as sgd:
        for step in range(len(batches)):
            for batch in step_batches(batches, step):
                sgd.step(batch)
    return sgd.state


def all_finite(state: ModelState) -> Tensor:
    """Tell for each client whether all its tensors are finite, shape (C,), bool."""
    tensors = (*state.params.values(), *state.stats.values())
    if norms_within(tensors, sys.float_info.max):  # client by client only where that fails
        return torch.ones(len(tensors[0]), dtype=torch.bool, device=tensors[0].device)
    # a last dimension of 1 first: a scalar tensor of C clients has shape (C,)
    flags = [v.isfinite().unsqueeze(-1).flatten(1).all(1) for v in tensors]
    return torch.stack(flags).all(0)


def finetune(
    model: nn.Module,
    hyperparams: Hyperparams,
    data: Any,
    *,
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    statistics: Statistics = "corrected",
    loss: Loss = "cross-entropy",
    ignore_index: int | None = None,
    outputs: Pick | None = None,
    optimizer: InnerOptimizer = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> nn.Module:
    """Fine-tune a copy of a model under given hyperparameters.

    Parameters
    ----------
    model
        The global model; the argument is untouched.
    hyperparams
        For one client: mix of shape (B,), rate of shape (P,).
    data
        The client's data, of which the training part is used, or that part alone: a pair
        (inputs, targets) or another form of :mod:`fedl2p.core.user_data`.
    epochs
        Passes over the training part.
    batch_size
        Examples per step.
    seed
        Determines the order of the batches and the augmentation.
    statistics
        How the client's running batch-norm statistics start, see :class:`InnerLoop`.
    loss, ignore_index, outputs
        What is minimised, see :mod:`fedl2p.core.objective`.
    optimizer, momentum, weight_decay
        What takes the steps, at the rates of ``hyperparams``, see :class:`InnerLoop`.

    Returns
    -------
    nn.Module
        An instance of the model's own class with plain batch-norm that holds the mixed statistics.

    Raises
    ------
    ValueError
        If the data do not fit the model or the loss.
    DivergedError
        If a parameter or statistic ends up not finite; a smaller rate helps.
    """
    net = FunctionalModel(model, objective(loss, ignore_index=ignore_index, outputs=outputs))
    inner = InnerLoop(
        epochs=epochs,
        batch_size=batch_size,
        statistics=statistics,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    data = as_client_data(data)
    check_examples(net, data.train, what="train")
    return finetune_one(net, hyperparams, data, inner, seed)


def finetune_one(
    net: FunctionalModel, hyperparams: Hyperparams, data: ClientData, inner: InnerLoop, seed: int
) -> nn.Module:
    """Fine-tune one client as :func:`finetune`, whose data have been checked."""
    if hyperparams.sites != net.sites:
        raise ValueError(
            "the hyperparameters were made for another model: their names of norm layers or "
            "parameter tensors differ from this model's"
        )
    batches = inner_batches(net, [data], [seed], inner)
    stacked = Hyperparams.stack([hyperparams]).to(net.device, net.dtype)
    state = run_inner_loop(
        net, stacked, batches, statistics=inner.statistics, optimizer=optimizer_of(inner)
    )
    if not all_finite(state)[0]:
        raise DivergedError(
            f"fine-tuning diverged: rates up to {hyperparams.rate.max():.3g} gave values "
            "that are not finite; use smaller rates or fewer epochs"
        )
    return fold_client(net, state, stacked.mix, 0)


def as_client_data(data: Any) -> ClientData:
    """Return a client's data; anything else that examples can be read from is its training part."""
    return data if isinstance(data, ClientData) else ClientData(data)


def inner_batches(
    net: FunctionalModel,
    data: Sequence[ClientData],
    seeds: Sequence[int],
    inner: InnerLoop,
    *,
    align: Align = "epochs",
) -> EpochBatches:
    """Return the inner batches of a stack of clients, on the device of the model."""
    on_device = {id(d.train): d.train.to(net.device) for d in data}
    unequal_sizes = len({d.train.num for d in data}) > 1
    return EpochBatches(
        [on_device[id(d.train)] for d in data],
        seeds,
        epochs=inner.epochs,
        batch_size=inner.batch_size,
        augment=[d.augment for d in data],
        raw=[None if d.raw is None else d.raw.to(net.device) for d in data],
        balanced=[d.balanced for d in data],
        align=align,
        fewest=fewest_to_stack(net, data[0].train.x) if unequal_sizes else 1,
    )


def fold_client(net: FunctionalModel, state: ModelState, mix: Tensor, client: int) -> nn.Module:
    """Fold one client's state, of finite tensors, into a copy of the user's model.

    ``mix`` is that of C clients in evaluation, shape (C, B).
    """
    return fold(
        net.plain,
        {k: v[client] for k, v in state.params.items()} | net.buffers_of(state.stats, client),
        dict(zip(net.sites.norms, mix[client], strict=True)),
        net.client_stats(state.stats, client),
    )
