"""fluke: ``CentralizedFL.run`` (its FedAvg), and the fine-tuning at the end of a federation.

``run`` ends with a broadcast and each client's ``finalize``; that is left out of rounds, and is
the fine-tuning, judged before and after by one metric of its evaluator (accuracy).
"""

from __future__ import annotations

import functools

from fluke import FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.evaluation import ClassificationEval
from fluke.server import Server
from torch import nn
from torchmetrics import Accuracy
from work import CLASSES, EPOCHS, RATE, Stopwatch, Weights, client, mean_of, serve, start


class Rounds(FedAVG):
    def finalize(self) -> None:
        """Nothing: rounds only."""


def people(count: int, batch: int) -> list[Client]:
    optimizer = OptimizerConfigurator({"name": "SGD", "lr": RATE})
    made = []
    for i in range(count):
        one = client(i)
        made.append(
            Client(
                index=i,
                train_set=FastDataLoader(
                    one.x, one.y, num_labels=CLASSES, batch_size=batch, shuffle=True
                ),
                test_set=FastDataLoader(one.test_x, one.test_y, num_labels=CLASSES),
                optimizer_cfg=optimizer,
                loss_fn=nn.CrossEntropyLoss(),
                local_epochs=1,
                fine_tuning_epochs=EPOCHS,
            )
        )
    return made


@functools.cache
def federation(count: int, batch: int, kind: type[FedAVG]) -> FedAVG:
    clients = people(count, batch)
    server = Server(start(), test_set=None, clients=clients, weighted=True)
    return kind(count, None, {}, clients=clients, server=server)


def judged(yes: bool) -> None:
    FlukeENV().set_eval_cfg(pre_fit=yes, post_fit=yes, locals=False, server=False)
    accuracy = Accuracy(task="multiclass", num_classes=CLASSES)
    FlukeENV().set_evaluator(ClassificationEval(1, CLASSES, accuracy=accuracy))


def rounds(watch: Stopwatch, count: int, number: int, batch: int) -> Weights:
    judged(False)
    algorithm = federation(count, batch, Rounds)
    algorithm.server.model.load_state_dict(start().state_dict())
    watch.start()
    algorithm.run(n_rounds=number, eligible_perc=1.0)
    watch.stop()
    return dict(algorithm.server.model.state_dict())


def tune(watch: Stopwatch, count: int, batch: int) -> Weights:
    judged(False)
    algorithm = federation(count, batch, Rounds)
    if not algorithm.rounds:  # only clients that took part are fine-tuned
        algorithm.run(n_rounds=1, eligible_perc=1.0)
    algorithm.server.model.load_state_dict(start().state_dict())
    judged(True)
    watch.start()
    FedAVG.finalize(algorithm)
    watch.stop()
    return mean_of([one.model for one in algorithm.clients])


if __name__ == "__main__":
    serve(rounds, tune)
