"""A population of clients whose tensors are in memory."""

from __future__ import annotations

from collections.abc import Mapping

from fedl2p.core import trees
from fedl2p.core.clientdata import ClientData
from fedl2p.data.population import Population, num_outputs


class InMemory(Population):
    """A population of given tensors.

    Parameters
    ----------
    seen
        Clients that take part in training, by name.
    unseen
        Clients that only come afterwards, by name.

    Raises
    ------
    ValueError
        If there is no seen client, a name occurs twice, or inputs differ in shape.
    """

    def __init__(
        self, seen: Mapping[str, ClientData], unseen: Mapping[str, ClientData] | None = None
    ) -> None:
        unseen = unseen or {}
        if not seen:
            raise ValueError("there is no seen client; give at least one to learn from")
        both = sorted(seen.keys() & unseen.keys())
        if both:
            raise ValueError(f"client {both[0]!r} is both seen and unseen; give each name once")
        self._clients = {**seen, **unseen}
        self.seen, self.unseen = tuple(seen), tuple(unseen)
        self.shape = tuple(trees.first_leaf(next(iter(seen.values())).train.x).shape[1:])
        for name, data in self._clients.items():
            shape = tuple(trees.first_leaf(data.train.x).shape[1:])
            if shape != self.shape:
                raise ValueError(
                    f"client {name!r} has inputs of shape {shape}, the first client of shape "
                    f"{self.shape}; all must agree"
                )
        self.classes = max(num_outputs(d.train.y) for d in self._clients.values())

    def open(self, name: str) -> ClientData:
        """Return the data of one client."""
        return self._clients[name]
