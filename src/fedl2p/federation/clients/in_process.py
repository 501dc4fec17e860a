"""Flower in this process: a Grid that hands cohorts of clients straight to the handler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flwr.app import Message

from fedl2p.federation.clients.local_grid import LocalGrid, Part
from fedl2p.federation.clients.node import Handler
from fedl2p.method import State


class InProcessGrid(LocalGrid):
    """A Flower grid whose nodes are the clients of a population, all in this process.

    Messages that ask for the same are grouped into cohorts, and each cohort is one call of the
    handler and so of the method: that is what makes many clients fast. A call in this process
    cannot be given up, so there are no timeouts.

    Parameters
    ----------
    handler
        The clients' side. Its population says which nodes there are.
    cohort
        Most clients in one call; 0 for no limit.

    Raises
    ------
    ValueError
        If ``cohort`` is negative.
    """

    def __init__(self, handler: Handler, *, cohort: int = 0) -> None:
        super().__init__(handler.population.names, cohort=cohort, live=handler.live)
        self.handler = handler

    def answer(
        self, parts: Sequence[Part], timeout: float | None
    ) -> Iterator[tuple[int, Sequence[Message]]]:
        """Yield place and replies of each part, one part after another."""
        for place, (messages, contexts) in enumerate(parts):
            yield place, self.handler.handle(messages, contexts)

    def remember(self, weights: State) -> str:
        """Let the handler know a global model; return its content hash."""
        return self.handler.remember(weights)
