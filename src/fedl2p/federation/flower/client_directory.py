"""The directory of clients: which node of a Flower grid is which client, and what each has."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import inf

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedl2p.federation.flower import records
from fedl2p.federation.messages import one_line

log = logging.getLogger("fedl2p")


class ClientDirectory:
    """The nodes of a grid by client name, and the global models that each is known to have.

    Parameters
    ----------
    grid
        The one that a ServerApp gets.
    timeout
        Seconds to wait for the replies to one question; None to wait for all.

    Attributes
    ----------
    shared
        The nodes that are several clients, and the models that each has.

    Raises
    ------
    ValueError
        If ``timeout`` is not above 0.
    """

    def __init__(self, grid: Grid, *, timeout: float | None = None) -> None:
        if timeout is not None and not 0 < timeout < inf:
            raise ValueError(f"timeout is {timeout}, but must be above 0 seconds, or None")
        self.grid = grid
        self.timeout = timeout
        self.shared: dict[int, set[str]] = {}
        self._nodes: dict[str, int] = {}
        self._models: dict[str, set[str]] = {}

    def online(self) -> set[int]:
        """Return the ids of the nodes that are connected."""
        return set(self.grid.get_node_ids())

    def refresh(self) -> tuple[str, ...]:
        """Ask every node which clients it is and which models it has; return the names, sorted.

        Raises
        ------
        ValueError
            If two nodes say that they are the same client.
        """
        nodes: dict[str, int] = {}
        models: dict[str, set[str]] = {}
        shared: dict[int, set[str]] = {}
        for reply in self._introductions(self.grid.get_node_ids()):
            node = reply.metadata.src_node_id
            try:
                said = records.record_of(reply.content, records.CONFIG, ConfigRecord)
                has = records.strings(said, "models")
                several = "clients" in said
                names = records.strings(said, "clients") if several else [str(said["client"])]
            except (KeyError, ValueError) as error:
                log.warning("node %d does not say who it is: %s", node, one_line(str(error)))
                continue
            if several:
                shared[node] = set(has)
            for name in names:
                if name in nodes:
                    raise ValueError(
                        f"two nodes say that they are client {name!r}; give each node its own "
                        "client"
                    )
                nodes[name], models[name] = node, set(has)
        self._nodes, self.shared = nodes, shared
        self._models |= models
        return tuple(sorted(nodes))

    def nodes_of(self, names: Iterable[str]) -> dict[str, int]:
        """Return the nodes of clients; the directory is refreshed if it lacks any.

        Raises
        ------
        ValueError
            If no node is one of them.
        """
        names = list(names)
        if any(name not in self._nodes for name in names):
            self.refresh()
        absent = [name for name in names if name not in self._nodes]
        if absent:
            raise ValueError(
                f"no node is client {absent[0]!r} ({len(absent)} of {len(names)} are missing); "
                f"{len(self._nodes)} nodes answered"
            )
        return {name: self._nodes[name] for name in names}

    def has_model(self, name: str, key: str) -> bool:
        """Return whether a client is known to have a model."""
        return key in self._models.get(name, ())

    def note_model(self, name: str, key: str, *, has: bool) -> None:
        """Note that a client has been sent a model, or that it has not got it."""
        models = self._models.setdefault(name, set())
        if has:
            models.add(key)
        else:
            models.discard(key)

    def clients_with(self, key: str) -> list[str]:
        """Return the clients that are known to have a model, sorted."""
        return sorted(name for name, models in self._models.items() if key in models)

    def _introductions(self, nodes: Iterable[int]) -> Iterable[Message]:
        asked = [Message(RecordDict(), node, records.QUERY, group_id="query") for node in nodes]
        for reply in self.grid.send_and_receive(asked, timeout=self.timeout):
            if reply.has_error():
                reason = one_line(reply.error.reason or f"error {reply.error.code}")
                log.warning("node %d: %s", reply.metadata.src_node_id, reason)
            else:
                yield reply
