"""Personalize a model for one client with learned meta-nets, without any search."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedl2p.core.data_check import check_examples
from fedl2p.core.finetuning.inner_loop import as_client_data, finetune_one
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.objective import Loss, PerExample, Pick, objective
from fedl2p.core.profiles import Profile, Profiler
from fedl2p.core.settings import InnerLoop, InnerOptimizer, Statistics
from fedl2p.text_table import short_repr

_COMPARE = "the hyperparameters may not suit this client: compare both models on its test examples"


@dataclass(frozen=True)
class Personalized:
    """A personalized model, and what it was made with.

    Parameters
    ----------
    model
        An instance of the global model's own class with plain batch-norm layers that hold the mixed
        statistics; it needs nothing of this package.
    hyperparams
        The hyperparameters that it was fine-tuned with.
    profile
        The client's profile, from which the meta-nets wrote these.
    """

    model: nn.Module
    hyperparams: Hyperparams
    profile: Profile

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:
        yield "model", type(self.model).__name__
        yield "hyperparams", self.hyperparams
        yield "profile", self.profile

    def __repr__(self) -> str:
        return short_repr(self)

    def _repr_html_(self) -> str:
        return self.hyperparams._repr_html_() + self.profile._repr_html_()


def personalize(
    model: nn.Module,
    metanets: MetaNets,
    data: Any,
    *,
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    statistics: Statistics = "corrected",
    loss: Loss = "cross-entropy",
    ignore_index: int | None = None,
    metric: str | PerExample | None = None,
    outputs: Pick | None = None,
    optimizer: InnerOptimizer = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Personalized:
    """Profile a client's data, let the meta-nets write hyperparameters, fine-tune with them.

    Parameters
    ----------
    model
        The global model that the meta-nets were learned for; the argument is untouched.
    metanets
        Learned meta-nets, e.g. ``MetaNets.load(path)``.
    data
        The client's data, of which the training part is used, or that part alone: a pair
        (inputs, targets) or another form of :mod:`fedl2p.core.user_data`.
    epochs, batch_size
        Passes over the training part and examples per step; those used in learning serve best.
    seed
        Determines the order of the batches.
    statistics
        Start of the client's running batch-norm statistics: ``corrected`` or ``published``, see
        :class:`~fedl2p.core.settings.InnerLoop`; those used in learning serve best.
    optimizer, momentum, weight_decay
        What takes the steps, at the learned rates, see there; those used in learning.
    loss, ignore_index, metric, outputs
        What is minimised, see :mod:`fedl2p.core.objective`; those used in learning. The metric is
        an entry of the profile.

    Returns
    -------
    Personalized
        The client's model, its hyperparameters and its profile.

    Warns
    -----
    UserWarning
        Once, if the client's profile lies far outside those that the meta-nets were learned on, or
        a tensor of the model has another shape, as far as their card knows.

    Raises
    ------
    ValueError
        If the meta-nets were learned for another model, or the data do not fit the model or loss.
    DivergedError
        If fine-tuning ends in values that are not finite.
    """
    if not isinstance(metanets, MetaNets):
        raise ValueError(
            f"metanets is a {type(metanets).__name__}, but must be fedl2p.MetaNets; "
            "fedl2p.MetaNets.load(path) reads saved ones"
        )
    data = as_client_data(data)
    aim = objective(loss, ignore_index=ignore_index, metric=metric, outputs=outputs)
    net = FunctionalModel(model, aim)
    inner = InnerLoop(
        epochs=epochs,
        batch_size=batch_size,
        statistics=statistics,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    check_examples(net, data.train, what="train")
    client_profile = Profiler(model, aim)(data.train.batches(256), metanets.config.groups)
    if said := metanets.card.misfits(model, client_profile, metanets.config.groups):
        warnings.warn(f"{said}; {_COMPARE}", stacklevel=2)
    with torch.no_grad():
        hyperparams = metanets(client_profile)
    tuned = finetune_one(net, hyperparams, data, inner, seed)
    return Personalized(tuned, hyperparams, client_profile)
