"""Waiting for the replies to messages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import inf

from flwr.app import Message
from flwr.serverapp import Grid

# Seconds between two looks for replies: often at first, since a look costs little.
_SHORTEST, _LONGEST = 0.05, 1.0


def send_and_receive(
    grid: Grid, messages: Sequence[Message], *, timeout: float | None, grace: float | None
) -> Iterator[Message]:
    """Send messages and yield the replies as they come, for a limited time.

    Parameters
    ----------
    grid
        Any Flower grid.
    messages
        One per node.
    timeout
        Seconds to wait for the replies; None to wait for all.
    grace
        When half of the nodes have answered, the others have as long again as these needed, but at
        least this many seconds. None: they have until the timeout.
    """
    waiting = {id_ for id_ in grid.push_messages(messages) if id_}
    began = time.monotonic()
    deadline, pause = inf if timeout is None else began + timeout, _SHORTEST
    half = False
    while waiting:
        replies = list(grid.pull_messages(waiting))
        waiting -= {reply.metadata.reply_to_message_id for reply in replies}
        now = time.monotonic()
        yield from replies
        if grace is not None and not half and 2 * len(waiting) <= len(messages):
            half = True
            deadline = min(deadline, now + max(grace, now - began))
        if not waiting or time.monotonic() >= deadline:
            return
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(1.5 * pause, _LONGEST)
