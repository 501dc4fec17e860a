"""Real handwritten digits, 40 seen and 20 unseen clients with label skew and a sensor each."""

from __future__ import annotations

from fedl2p.data.digits import Digits
from fedl2p.federation import Rounds
from fedl2p.methods.settings import Grid, Settings
from fedl2p.study import Study


def recipe() -> Study:
    """Return the embedded default: the whole job in minutes on two cores, without a download."""
    return Study(
        data=Digits(),
        pretrain=Rounds(rounds=120, clients_per_round=10),
        # Clients send clipped hypergradients; the server takes one Adam step on their mean.
        learn=Rounds(
            rounds=15,
            clients_per_round=20,
            strategy="fedadam",
            server_rate=0.01,
            server_tau=1e-8,
        ),
        # The searches cost most of the time: each tries the whole grid on 40 and on 60 clients.
        settings=Settings(
            grid=Grid(mixes=(0.0, 0.5, 1.0), rates=(0.01, 0.03, 0.1, 0.3)),
            alone_steps=8,
            alone_rate=0.01,
        ),
    )
