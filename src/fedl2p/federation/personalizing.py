"""Personalize clients, seen or not, wherever they are; only numbers come back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import nn

from fedl2p.data.population import Population
from fedl2p.federation.clients.node import FAILURE, OUTCOME_NUMBERS
from fedl2p.federation.flower import records
from fedl2p.federation.flower.client_directory import Frozen, Nodes, in_process
from fedl2p.federation.listeners import Listener
from fedl2p.federation.server.answer_checks import MOST_EXAMPLES, one_line
from fedl2p.method import Method, Outcome, State
from fedl2p.seeds import derive_seed

log = logging.getLogger("fedl2p")

_COUNTS = ("num_train", "num_test")


def personalize_all(
    method: Method,
    model: nn.Module,
    state: State,
    population: Population,
    *,
    seed: int,
    names: Sequence[str] | None = None,
    nodes: Nodes | None = None,
    listeners: Sequence[Listener] = (),
) -> list[Outcome]:
    """Have clients personalize and evaluate themselves.

    Hyperparameters and profiles never travel: the outcomes have none. The clients' side writes
    them to files where its handler has a folder.

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
    nodes
        Where the clients are; None for this process. Give those of the rounds, or clients have
        forgotten what they keep.
    listeners
        Told of the start and the end.

    Returns
    -------
    list of Outcome
        One per name, in order. A client that failed says so in ``failure``; its numbers are then
        NaN, but for those of its examples, which are 0 where they are not known.

    Raises
    ------
    ValueError
        If a client has no node.
    """
    names = population.names if names is None else tuple(names)
    nodes = nodes or in_process(model, population, {method.name: method})
    for listener in listeners:
        listener.on_start(f"personalize {method.name}", 0, ())
    try:
        answers = nodes.ask(
            records.PERSONALIZE,
            {name: derive_seed(seed, "personalize", 0, name) for name in names},
            method=method.name,
            stage="personalize",
            round=0,
            state=state,
            model=Frozen.of(model),
        )
    finally:
        for listener in listeners:
            listener.on_end(f"personalize {method.name}")
    outcomes = []
    for name in names:
        failure = answers.failures.get(name)
        outcomes.append(
            _failed(name, failure)
            if failure is not None
            else _outcome(name, answers.contents[name])
        )
        if outcomes[-1].failure is not None:
            reason = outcomes[-1].failure
            log.warning("personalize %s: client %s failed: %s", method.name, name, reason)
    return outcomes


def _outcome(name: str, content: RecordDict) -> Outcome:
    try:
        metrics: Mapping[str, Any] = records.record_of(content, records.METRICS, MetricRecord)
        if records.CONFIG in content:
            reason = str(records.record_of(content, records.CONFIG, ConfigRecord)[FAILURE])
            counts = {key: min(max(int(metrics[key]), 0), int(MOST_EXAMPLES)) for key in _COUNTS}
            return _failed(name, one_line(reason), **counts)
        numbers: dict[str, Any] = {
            key: int(metrics[key]) if key in _COUNTS else float(metrics[key])
            for key in OUTCOME_NUMBERS
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return _failed(name, one_line(f"its answer cannot be read: {error}"))
    if (fault := _implausible(numbers)) is not None:
        return _failed(name, fault)
    return Outcome(client=name, **numbers)


def _implausible(numbers: Mapping[str, Any]) -> str | None:
    """Return which number of an answer no client can have, in one line, or None."""
    for key in _COUNTS:
        if not 0 <= numbers[key] <= MOST_EXAMPLES:
            return f"its {key} is {numbers[key]}, wanted a number of examples"
    for key in ("accuracy_before", "accuracy"):
        untested = numbers["num_test"] == 0 and isnan(numbers[key])
        if not (untested or 0 <= numbers[key] <= 1):
            return f"its {key} is {numbers[key]}, wanted a fraction in [0, 1]"
    return None


def _failed(name: str, reason: str, *, num_train: int = 0, num_test: int = 0) -> Outcome:
    return Outcome(
        client=name,
        num_train=num_train,
        num_test=num_test,
        accuracy_before=nan,
        accuracy=nan,
        loss_before=nan,
        loss=nan,
        seconds=nan,
        failure=reason,
    )
