"""fedl2p: ``federate`` with ``FedAvg``, and ``personalize_all`` with ``FineTuning``, in process.

A round checks every answer and validates the global model; the plain loop does neither. Clients
fine-tune with a mix of 1 and running statistics from the global ones, which is plain training.
"""

from __future__ import annotations

import functools

from torch import nn
from work import CLASSES, EPOCHS, RATE, SHAPE, Stopwatch, Weights, client, serve, start

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.settings import InnerLoop
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.clients.in_process import InProcess, in_process
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.methods.fedavg import FedAvg
from fedl2p.methods.finetuning import FineTuning
from fedl2p.models import small_conv


@functools.cache
def model() -> nn.Module:
    net = small_conv(SHAPE, CLASSES)
    net.load_state_dict(start().state_dict())
    return net


def data(index: int) -> ClientData:
    one = client(index)
    part = Examples(one.test_x, one.test_y)
    return ClientData(Examples(one.x, one.y), part, part)


@functools.cache
def averaging(count: int, batch: int) -> tuple[FedAvg, InMemory, InProcess]:
    method = FedAvg(name="fedavg", local=LocalTraining(epochs=1, batch_size=batch, rate=RATE))
    population = InMemory({f"c{i:03d}": data(i) for i in range(count)})
    return method, population, in_process(model(), population, {"fedavg": method})


@functools.cache
def tuning(count: int, batch: int) -> tuple[FineTuning, InMemory, InProcess]:
    loop = InnerLoop(epochs=EPOCHS, batch_size=batch, statistics="global")
    method = FineTuning(name="finetuning", mix=1.0, rate=RATE, inner=loop)
    population = InMemory({f"c{i:03d}": data(i) for i in range(count)})
    return method, population, in_process(model(), population, {"finetuning": method})


def rounds(watch: Stopwatch, count: int, number: int, batch: int) -> Weights:
    method, population, clients = averaging(count, batch)
    settings = Rounds(rounds=number, clients_per_round=count, keep="last")
    watch.start()
    done = federate(
        method, model(), population, rounds=settings, seed=0, stage="pretrain", clients=clients
    )
    watch.stop()
    return done.state


def tune(watch: Stopwatch, count: int, batch: int) -> list[float]:
    method, population, clients = tuning(count, batch)
    state = method.start(model())
    watch.start()
    outcomes = personalize_all(method, model(), state, population, seed=0, clients=clients)
    watch.stop()
    return [outcome.loss for outcome in outcomes]


if __name__ == "__main__":
    serve(rounds, tune)
