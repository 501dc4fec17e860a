"""Many answers become one that a minority of hostile clients cannot choose: Flower's strategies.

No rule looks at a weight, since clients state their own. The strategies get updates (differences to
the state, in float64) instead of states: their results move along with any shift, and the
distances that Krum squares lose no digits to what all clients have in common.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedl2p.federation.flower import records
from fedl2p.federation.server.clipping import clipped, difference, moved
from fedl2p.federation.server.replies import Reply
from fedl2p.federation.settings import Rounds
from fedl2p.method import State


def combined(rounds: Rounds, state: State, replies: Sequence[Reply]) -> State | None:
    """Return the state that the rule makes of the answers, or None if they are too few for it.

    Parameters
    ----------
    rounds
        Names the rule (``robust``) and its numbers.
    state
        The state that was sent.
    replies
        Checked answers, sorted by client.
    """
    if len(replies) < rounds.fewest:
        return None
    if rounds.robust == "normclipping" or rounds.clip_norm:
        replies = clipped(state, replies, rounds.clip_norm)
    rule = _rule(rounds, len(replies))
    with quiet_flower(), np.errstate(over="ignore", invalid="ignore"):
        arrays, _ = rule.aggregate_train(0, [_message(state, reply) for reply in replies])
    if arrays is None:
        return None
    return moved(state, {name: arrays[name].numpy() for name in state})


def _rule(rounds: Rounds, count: int) -> flower.FedAvg:
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
            return flower.FedAvg()


def _message(state: State, reply: Reply) -> Message:
    arrays = ArrayRecord()
    for name, array in difference(state, reply.shared).items():
        arrays[name] = records.TensorArray(
            torch.from_numpy(np.asarray(array))
        )  # nothing is encoded
    content = RecordDict(
        {records.ARRAYS: arrays, records.METRICS: MetricRecord({records.WEIGHT: 1.0})}
    )
    return Message(content, dst_node_id=1, message_type=records.TRAIN)


@contextmanager
def quiet_flower() -> Iterator[None]:
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
