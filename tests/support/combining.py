"""One round's updates combined as the rounds do it, without rounds."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedl2p.federation.privacy.noise import Gaussian, seeded
from fedl2p.federation.rounds import mean_of
from fedl2p.federation.server.aggregation import ServerOptimizer
from fedl2p.federation.settings import Rounds
from fedl2p.method import State, Update


def combine(
    state: State,
    updates: Sequence[Update],
    rounds: Rounds | None = None,
    *,
    optimizer: ServerOptimizer | None = None,
    buffers: Collection[str] = (),
    variances: Collection[str] = (),
    clients: int = 1,
    draw: Gaussian | None = None,
) -> State | None:
    """Return the next state of updates in the order of their clients; None if they are too few."""
    rounds = rounds or Rounds()
    mean = mean_of(rounds, clients)(state, draw or seeded(0))
    for update in sorted(updates, key=lambda update: update.client):
        mean.add(update)
    made = mean.result()
    optimizer = optimizer or ServerOptimizer(rounds, buffers=buffers, variances=variances)
    return None if made is None else optimizer.step(state, made)
