"""Clients on remote nodes: the server has their names only, each node has its file.

Shape of an example and number of classes are settings; each node checks its file against them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fedl2p.core.clientdata import ClientData
from fedl2p.data.files.npz_client import MAX_CLASSES, read_npz_client
from fedl2p.data.population import Population

log = logging.getLogger("fedl2p")


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Clients whose data stay on remote nodes.

    Parameters
    ----------
    shape
        Shape of one example, without the batch, e.g. (1, 8, 8); empty only until one is named.
    classes
        Number of classes; 0 only until it is named.
    clients
        Names of the clients that take part. The server fills it in when the nodes have answered.
    """

    shape: tuple[int, ...] = ()
    classes: int = 0
    clients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape is {self.shape}, but each of its sizes must be 1 or more")
        if not 0 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"classes must be 1 to {MAX_CLASSES}, got {self.classes}")

    def open(self, seed: int) -> RemotePopulation:
        """Return the clients' names; their data cannot be opened here.

        Raises
        ------
        ValueError
            If shape, classes or clients are not named.
        """
        self.check()
        if not self.clients:
            raise ValueError(
                "no clients are named: their data are on remote nodes; start such a study by "
                "`flwr run`, see docs/deploy.md"
            )
        return RemotePopulation(self.clients, shape=self.shape, classes=self.classes)

    def check(self) -> None:
        """Raise ValueError if shape or classes are not named."""
        if not self.shape or not self.classes:
            raise ValueError(
                "the shape of an example and the number of classes are not named; give both, in "
                "a run configuration as data.shape='1,8,8' data.classes=10"
            )


class RemotePopulation(Population):
    """The server's side: names without data, all seen."""

    def __init__(self, names: tuple[str, ...], *, shape: tuple[int, ...], classes: int) -> None:
        self.seen = names
        self.unseen = ()
        self.shape = shape
        self.classes = classes

    def open(self, name: str) -> ClientData:
        """Raise ValueError: the data are on the node."""
        raise ValueError(f"the data of client {name!r} are on its node")


class NodePopulation(Population):
    """The node's side: one client with its .npz file.

    Parameters
    ----------
    name
        The client's name.
    file
        Its .npz file, see :mod:`fedl2p.data.files.npz_client`. It is read when it is opened.
    shape, classes
        Shape of an example and number of classes that the file must have.
    split
        Whether a fifth of the training part becomes the validation part of a file without one.
    """

    def __init__(
        self, name: str, file: Path, *, shape: tuple[int, ...], classes: int, split: bool = True
    ) -> None:
        self.seen = (name,)
        self.unseen = ()
        self.shape = shape
        self.classes = classes
        self._file = file
        self._split = split

    def open(self, name: str) -> ClientData:
        """Return the file's data.

        Raises
        ------
        ValueError
            If the file cannot be used. The message may be sent to the server, so only the node's
            log names the file and its fault.
        """
        if name not in self.seen:
            raise KeyError(f"there is no client {name!r}; this node is {self.seen[0]!r}")
        try:
            return read_npz_client(
                self._file, shape=self.shape, classes=self.classes, split=self._split
            )
        except ValueError as problem:
            log.error("%s", problem)
            raise ValueError(
                "the node's data file cannot be used; the log on the node says why"
            ) from None
