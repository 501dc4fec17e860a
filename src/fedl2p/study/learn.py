"""Learn meta-nets for a model and clients of one's own, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedl2p import methods
from fedl2p.core.clientdata import ClientData
from fedl2p.core.data_check import check_client
from fedl2p.core.finetuning.inner_loop import as_client_data
from fedl2p.core.functional.recorded_objective import with_objective
from fedl2p.core.metanets import MetaNets
from fedl2p.core.objective import Loss, PerExample, Pick, objective
from fedl2p.core.sites import check_module
from fedl2p.core.working_copies import working_copies
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.clients.in_process import in_process
from fedl2p.federation.listeners import Listener, progress_bar
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import DEFAULT_ROUNDS, Rounds
from fedl2p.methods.base.settings import Settings
from fedl2p.study.metanets_card import learned_card


@torch.inference_mode(False)  # copies of the model made in here are to be trained
def learn(
    model: nn.Module,
    clients: Mapping[str, Any],
    *,
    rounds: Rounds = DEFAULT_ROUNDS,
    settings: Settings | None = None,
    seed: int = 0,
    loss: Loss = "cross-entropy",
    ignore_index: int | None = None,
    metric: str | PerExample | None = None,
    outputs: Pick | None = None,
    data_licence: str | None = None,
    progress: bool = True,
    listeners: Sequence[Listener] = (),
) -> MetaNets:
    """Learn, in this process, how clients of a population should fine-tune a model.

    Parameters
    ----------
    model
        The global model, pre-trained; only read.
    clients
        :class:`~fedl2p.ClientData` by name. Each needs a training and a validation part.
    rounds
        Rounds, clients per round and server optimizer.
    settings
        Inner and outer loop (its ``finetune`` and ``meta``); by default 15 epochs in batches of 32,
        which are also the defaults of :func:`fedl2p.personalize`.
    seed
        The source of all randomness.
    loss, ignore_index, metric, outputs
        What clients are trained and evaluated on, see :mod:`fedl2p.core.objective`.
    data_licence
        Licence of the clients' data, for the card of the meta-nets.
    progress
        Whether to show a progress bar, see :func:`fedl2p.federation.listeners.progress_bar`.
    listeners
        Told of every round.

    Returns
    -------
    MetaNets
        To be saved, and given to :func:`fedl2p.personalize`. Their card says how they were
        learned, with the smallest and largest entries of the clients' profiles.

    Raises
    ------
    ValueError
        If a client has no validation part, its data do not fit the model or the loss, or no client
        can be used.
    """
    check_module(model)
    method = methods.build(methods.METANETS, settings or Settings())
    aim = objective(loss, ignore_index=ignore_index, metric=metric, outputs=outputs)
    model = with_objective(model, aim)
    data = {name: _client_data(name, client) for name, client in clients.items()}
    for name, client in data.items():
        check_client(working_copies(model).net, client, name)
    population = InMemory(data)
    asked = in_process(
        model, population, {method.name: method}, privacy={method.name: rounds.privacy}
    )
    with progress_bar(progress) as bar:
        done = federate(
            method,
            model,
            population,
            rounds=rounds,
            seed=seed,
            stage=method.stage,
            clients=asked,
            listeners=[*bar, *listeners],
        )
    nets = method.final_metanets(model, done.state)
    assert nets is not None
    nets.card = learned_card(
        nets,
        model,
        method,
        rounds=rounds,
        clients=asked,
        seen=len(data),
        seed=seed,
        data_licence=data_licence,
    )
    return nets


def _client_data(name: str, given: Any) -> ClientData:
    try:
        data = as_client_data(given)
    except ValueError as error:
        raise ValueError(f"client {name!r}: {error}") from None
    if data.validation is None:
        raise ValueError(
            f"client {name!r} has no validation part, on which meta-nets are learned; give it one: "
            "ClientData(train=..., validation=...)"
        )
    return data
