"""Personalize clients, seen or not, wherever they are; only numbers come back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from math import isnan

import torch
from torch import nn

from fedl2p.core.functional.recorded_objective import objective_of
from fedl2p.data.population import Population
from fedl2p.federation.clients.in_process import in_process
from fedl2p.federation.clients.node import failed_outcome
from fedl2p.federation.listeners import Listener
from fedl2p.federation.messages import (
    Answer,
    Clients,
    FederationError,
    FrozenModel,
    Question,
    one_line,
)
from fedl2p.federation.server.answer_checks import MOST_EXAMPLES
from fedl2p.method import Method, Outcome, State
from fedl2p.runs.columns import ACCURACIES, COUNTS
from fedl2p.seeds import derive_seed

log = logging.getLogger("fedl2p")


@torch.inference_mode(False)
@torch.enable_grad()
def personalize_all(
    method: Method,
    model: nn.Module,
    state: State,
    population: Population,
    *,
    seed: int,
    names: Sequence[str] | None = None,
    clients: Clients | None = None,
    listeners: Sequence[Listener] = (),
    has_accuracy: bool | None = None,
) -> list[Outcome]:
    """Have clients personalize and evaluate themselves.

    Hyperparameters and profiles never travel: the outcomes have none. What is to be done with them
    on the clients' side, their node says (``on_personalized``).

    Parameters
    ----------
    method
        How clients are personalized.
    model
        The frozen model.
    state
        What the method's rounds ended with.
    population
        The clients.
    seed
        The study's seed. A client's own seed is the same for every method.
    names
        Which clients; None for all, the seen and the unseen ones.
    clients
        Where they are; None for this process. Give those of the rounds, or clients have forgotten
        what they keep.
    listeners
        Called at the start, after every client and at the end.
    has_accuracy
        Whether the loss has an accuracy, or a metric in its place; if not, it is NaN. None for what
        is recorded on the model.

    Returns
    -------
    list of Outcome
        One per name, in order. A client that failed says so in ``failure``; its numbers are then
        NaN, but for those of its examples, which are 0 where they are not known.

    Raises
    ------
    ValueError
        If a client does not exist.
    FederationError
        If every client failed: then there is no result, and no row.
    """
    names = population.names if names is None else names
    if has_accuracy is None:
        has_accuracy = objective_of(model).has_metric
    if clients is None:
        clients = in_process(model, population, {method.name: method})
    question = Question(
        action="personalize",
        method=method.name,
        stage="personalize",
        round=0,
        state=state,
        model=FrozenModel.of(model),
        seeds={name: derive_seed(seed, "personalize", 0, name) for name in sorted(names)},
    )
    stage = f"personalize {method.name}"
    for listener in listeners:
        listener.on_start(stage, 0, ())
    try:
        outcomes: dict[str, Outcome] = {}
        for answer in clients.ask(question):
            outcomes[answer.client] = _outcome(answer, has_accuracy=has_accuracy)
            for listener in listeners:
                listener.on_client(stage, len(outcomes), len(names))
        failed = {name: outcomes[name].failure or "" for name in names if outcomes[name].failure}
        for name, reason in failed.items():
            log.warning("%s: client %s failed: %s", stage, name, reason)
        for listener in listeners:
            listener.on_personalized(stage, failed)
    finally:
        for listener in listeners:
            listener.on_end(stage)
    if names and len(failed) == len(names):
        client, reason = next(iter(failed.items()))
        raise FederationError(
            f"{stage}: every client failed, so there is no result; client {client!r}: {reason}; "
            "mend the model or the data, or leave the method out"
        )
    return [outcomes[name] for name in names]


def _outcome(answer: Answer, *, has_accuracy: bool) -> Outcome:
    """Return an answer's outcome, or that of a failure if no client can have its numbers."""
    outcome = answer.outcome
    if outcome is None:
        return failed_outcome(answer.client, one_line(answer.failure or ""))
    if outcome.failure is not None:
        counts = {key: min(max(getattr(outcome, key), 0), int(MOST_EXAMPLES)) for key in COUNTS}
        return replace(outcome, failure=one_line(outcome.failure), **counts)
    if (fault := _implausible(outcome, has_accuracy=has_accuracy)) is not None:
        return failed_outcome(answer.client, fault)
    return outcome


def _implausible(outcome: Outcome, *, has_accuracy: bool) -> str | None:
    """Return which number of an outcome no client can have, in one line, or None."""
    for key in COUNTS:
        if not 0 <= getattr(outcome, key) <= MOST_EXAMPLES:
            return f"its {key} is {getattr(outcome, key)}, wanted a number of examples"
    for key in ACCURACIES:
        value = getattr(outcome, key)
        unknown = isnan(value) and (outcome.num_test == 0 or not has_accuracy)
        if not (unknown or 0 <= value <= 1):
            return f"its {key} is {value}, wanted a fraction in [0, 1]"
    return None
