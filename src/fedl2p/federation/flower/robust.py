"""Robust rules: many updates become one that a minority of hostile clients cannot choose.

They are Flower's strategies. None looks at a weight, since clients state their own. The strategies
get updates (differences to the state, in float64) instead of states: their results move along with
any shift, and the distances that Krum squares lose no digits to what all clients have in common.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedl2p.federation.flower import records
from fedl2p.federation.messages import WEIGHT
from fedl2p.federation.server.aggregation import clipped
from fedl2p.federation.settings import Rounds
from fedl2p.federation.updates import difference, moved
from fedl2p.method import State, Update


def robust_rule(rounds: Rounds) -> Callable[[State, Sequence[Update]], State | None]:
    """Return the rule that the settings name: it makes a state of a round's updates.

    The rule returns None for fewer updates than ``rounds.fewest``.
    """

    def rule(state: State, updates: Sequence[Update]) -> State | None:
        if len(updates) < rounds.fewest:
            return None
        changes = [
            difference(state, clipped(state, update, rounds.clip_norm).shared) for update in updates
        ]
        with _quiet_flower(), np.errstate(over="ignore", invalid="ignore"):
            arrays, _ = _strategy(rounds, len(updates)).aggregate_train(
                0,
                [_Reply(change) for change in changes],  # type: ignore[misc]
            )
        if arrays is None:
            return None
        return moved(
            state, {name: torch.from_numpy(np.asarray(arrays[name].numpy())) for name in state}
        )

    return rule


def _strategy(rounds: Rounds, count: int) -> flower.FedAvg:
    match rounds.robust:
        case "fedmedian":
            return flower.FedMedian()
        case "fedtrimmedavg":
            return flower.FedTrimmedAvg(beta=rounds.trim)
        case "krum":
            return flower.Krum(num_malicious_nodes=rounds.hostile)
        case "multikrum":
            return flower.MultiKrum(
                num_malicious_nodes=rounds.hostile, num_nodes_to_select=count - rounds.hostile
            )
        case "bulyan":
            return flower.Bulyan(num_malicious_nodes=rounds.hostile)
        case _:
            raise AssertionError(rounds.robust)


class _Tensor(Array):
    """A tensor where a strategy expects an array; nothing is encoded."""

    array: np.ndarray[Any, Any]

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.__dict__.update(array=array, data=b"")

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array


class _Reply:
    """What a strategy reads of a reply; a message would need Flower's runtime."""

    def __init__(self, change: dict[str, torch.Tensor]) -> None:
        arrays = ArrayRecord()
        for name, tensor in change.items():
            arrays[name] = _Tensor(tensor.numpy())
        metrics = MetricRecord({WEIGHT: 1.0})
        self.content = RecordDict({records.ARRAYS: arrays, records.METRICS: metrics})

    def has_error(self) -> bool:
        return False


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Silence what every aggregation would write to the console, and spare its collections."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    # Flower collects garbage once per answer, which takes seconds with all of torch to look
    # through; what is frozen is not looked at.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)
