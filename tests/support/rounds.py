"""One round of FedAvg over any population: the smoke check of the data tests."""

from __future__ import annotations

import math

from fedl2p import methods, models
from fedl2p.data.population import Population
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining, Settings

SMALL = "fedl2p.models:small_conv"


def one_round(population: Population, *, clients: int = 0, model: str = SMALL) -> None:
    """Train the small net for one round and check that it was judged on all clients."""
    settings = Settings(local=LocalTraining(rate=0.01, batch_size=8))
    net = models.build(model, shape=population.shape, classes=population.classes, seed=0)
    done = federate(
        methods.build("fedavg", settings),
        net,
        population,
        rounds=Rounds(rounds=1, clients_per_round=clients, keep="last"),
        seed=0,
        stage="pretrain",
    )
    first = done.records[0]
    assert first.clients == (clients or len(population.seen))
    assert first.failures == 0
    assert math.isfinite(first.loss)
    moved = [not v.equal(net.state_dict()[k]) for k, v in done.state.items()]
    assert any(moved)
