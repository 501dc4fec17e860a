"""Waiting for clients to come."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

from fedl2p.federation.flower.client_directory import ClientDirectory

log = logging.getLogger("fedl2p")

# How often to ask again who is there. Every question costs each node a process.
_ASK_AGAIN = 30.0


def wait_for_clients(
    directory: ClientDirectory,
    *,
    count: int = 1,
    names: Sequence[str] = (),
    seconds: float,
    without: Collection[str] = (),
) -> tuple[str, ...]:
    """Wait until enough clients are there and return their names, sorted.

    Parameters
    ----------
    directory
        Asks the nodes which clients they are.
    count
        How many to wait for.
    names
        Whom to wait for, in place of a number; empty for whoever comes.
    seconds
        How long.
    without
        Names that do not count, unless ``names`` has them.

    Raises
    ------
    ValueError
        If they are not there in time, or two nodes are the same client.
    """
    wanted = len(names) or count
    deadline = time.monotonic() + seconds
    asked, asked_at = set[int](), -_ASK_AGAIN
    found: tuple[str, ...] = ()
    seen = -1
    log.info("waiting for %d clients, for at most %g s", wanted, seconds)
    while True:
        online = directory.online()
        if len(online) != seen:
            seen = len(online)
            log.info("%d nodes are online, %d clients are wanted", seen, wanted)
        again = online != asked or time.monotonic() - asked_at > _ASK_AGAIN
        if len(online) >= wanted and again:
            known = directory.refresh()
            found = tuple(n for n in known if n in names or n not in without)
            if names:
                found = tuple(n for n in found if n in names)
            if len(found) >= wanted:
                log.info("clients: %s", ", ".join(found))
                return found
            asked, asked_at = online, time.monotonic()
        if time.monotonic() >= deadline:
            absent = sorted(set(names) - set(found))
            who = f"; {', '.join(absent)} did not" if absent else ""
            raise ValueError(
                f"{len(found)} of {wanted} clients answered within {seconds:g} s{who}; "
                f"{len(online)} nodes are online: start the others, wait longer or ask for fewer "
                "(wait, min-clients, clients); the log names nodes that cannot be used"
            )
        time.sleep(1)
