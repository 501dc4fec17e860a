"""A population of clients: who they are, which are seen, and how to open one's data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from fedl2p.core.clientdata import ClientData
from fedl2p.data.pools.names import chained


class Population(ABC):
    """Clients by name: ``seen`` ones take part in training, ``unseen`` ones come afterwards.

    Names are tuples, or computed by position where there are many
    (:class:`~fedl2p.data.pools.names.Numbered`, or another
    :class:`~fedl2p.data.pools.names.LazyNames`): rounds then cost what their clients cost, however
    many are registered. Any other sequence will do, but becomes a tuple where names are looked up
    in it.
    """

    seen: Sequence[str]
    unseen: Sequence[str]
    classes: int
    shape: tuple[int, ...]

    @property
    def names(self) -> Sequence[str]:
        """All client names: the seen ones, then the unseen ones; their order is part of it."""
        return chained(self.seen, self.unseen)

    @abstractmethod
    def open(self, name: str) -> ClientData:
        """Return the data of one client; the same data at every call.

        Raises
        ------
        KeyError
            If there is no such client.
        """

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return what is known of a client for reports.

        For example ``{"sensor": "blur", "severity": 0.7}``.
        """
        return {}
