"""Personalize a model for one client with learned meta-nets, without any search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData
from fedl2p.core.finetuning.inner_loop import as_client_data, finetune
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import Profile, profile
from fedl2p.core.settings import InnerOptimizer, Statistics


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


def personalize(
    model: nn.Module,
    metanets: MetaNets,
    data: ClientData | tuple[Tensor, Tensor],
    *,
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    statistics: Statistics = "corrected",
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
        The client's data, of which the training part is used, or a pair (x, y).
    epochs, batch_size
        Passes over the training part and examples per step; those used in learning serve best.
    seed
        Determines the order of the batches.
    statistics
        Start of the client's running batch-norm statistics: ``corrected`` or ``published``, see
        :class:`~fedl2p.core.settings.InnerLoop`; those used in learning serve best.
    optimizer, momentum, weight_decay
        What takes the steps, at the learned rates, see there; those used in learning.

    Returns
    -------
    Personalized
        The client's model, its hyperparameters and its profile.

    Raises
    ------
    ValueError
        If the meta-nets were learned for another model.
    DivergedError
        If fine-tuning ends in values that are not finite.
    """
    data = as_client_data(data)
    if len(data.train.x) == 0:
        raise ValueError("there is no training example; personalization needs at least one")
    client_profile = profile(model, data.train.x.split(256))
    with torch.no_grad():
        hyperparams = metanets(client_profile)
    tuned = finetune(
        model,
        hyperparams,
        data,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        statistics=statistics,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return Personalized(tuned, hyperparams, client_profile)
