"""The directory of clients: which node of a Flower grid is which client, and what each has."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedl2p.atomic_files import read_text
from fedl2p.federation.flower import records
from fedl2p.federation.flower.introductions import Introduction
from fedl2p.federation.flower.waiting import send_and_receive
from fedl2p.federation.messages import one_line

log = logging.getLogger("fedl2p")


class ClientDirectory:
    """The nodes of a grid by client name, and the global models that each is known to have.

    Parameters
    ----------
    grid
        The one that a ServerApp gets.
    timeout, grace
        Seconds to wait, see :func:`~fedl2p.federation.flower.waiting.send_and_receive`.
    simulation
        Whether a node may be several clients. In a federation of machines a node that says so is
        left out: else one node could outvote all others.
    keys
        Public keys by client name (see :func:`read_keys`): a client is then believed only on the
        node that has its key, and others are left out. None to believe every node.
    settings
        Hash of the settings that nodes must have; empty where they get them from the server.

    Attributes
    ----------
    shared
        The nodes that are several clients, and the models that each has.

    Raises
    ------
    ValueError
        If ``timeout`` or ``grace`` is not above 0.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        timeout: float | None = None,
        grace: float | None = None,
        simulation: bool = False,
        keys: Mapping[str, bytes] | None = None,
        settings: str = "",
    ) -> None:
        for name, value in (("timeout", timeout), ("grace", grace)):
            if value is not None and not 0 < value < inf:
                raise ValueError(f"{name} is {value}, but must be above 0 seconds, or None")
        self.grid = grid
        self.timeout, self.grace = timeout, grace
        self.shared: dict[int, set[str]] = {}
        self._simulation, self._keys, self._settings = simulation, keys, settings
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
        keys = self._keys_of_nodes()
        for reply in self._introductions(self.grid.get_node_ids()):
            node = reply.metadata.src_node_id
            try:
                said = Introduction.decode(reply.content)
            except ValueError as error:
                log.warning("node %d does not say who it is: %s", node, one_line(str(error)))
                continue
            reason = said.objection(simulation=self._simulation, settings=self._settings)
            if reason is None and self._keys is not None:
                wrong = [n for n in said.clients if keys.get(node) != self._keys.get(n, b"")]
                reason = f"it has not the key of client {wrong[0]!r}" if wrong else None
            if reason is not None:
                log.warning("node %d (%s) is left out: %s", node, _listed(said.clients), reason)
                continue
            if said.several:
                shared[node] = set(said.models)
            for name in said.clients:
                if name in nodes:
                    raise ValueError(
                        f"two nodes say that they are client {name!r}; give each node its own "
                        "client, or name the clients' public keys"
                    )
                nodes[name], models[name] = node, set(said.models)
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

    def _keys_of_nodes(self) -> dict[int, bytes]:
        """Return the public keys that the SuperLink knows nodes by, where they are asked for."""
        if self._keys is None:
            return {}
        return {node.node_id: _canonical(node.public_key) for node in self.grid.get_nodes()}

    def _introductions(self, nodes: Iterable[int]) -> Iterable[Message]:
        asked = [Message(RecordDict(), node, records.QUERY, group_id="query") for node in nodes]
        for reply in send_and_receive(self.grid, asked, timeout=self.timeout, grace=self.grace):
            if reply.has_error():
                reason = one_line(reply.error.reason or f"error {reply.error.code}")
                log.warning("node %d: %s", reply.metadata.src_node_id, reason)
            else:
                yield reply


def read_keys(folder: Path) -> dict[str, bytes]:
    """Return the public keys in a folder of ``CLIENT.pub`` files, as ssh-keygen writes them.

    Raises
    ------
    ValueError
        If there is none, or a file holds no such key.
    """
    keys = {}
    for file in sorted(folder.glob("*.pub")):
        try:
            key = load_ssh_public_key(read_text(file).encode())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(f"{file} is no public key ({one_line(str(error))})") from None
        keys[file.stem] = _encoded(key)
    if not keys:
        raise ValueError(f"{folder} holds no CLIENT.pub file, the public key of a node")
    return keys


def _canonical(pem: bytes) -> bytes:
    """Return a node's public key in one form; empty if it has none that can be read."""
    try:
        return _encoded(load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm):
        return b""


def _encoded(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} clients"
