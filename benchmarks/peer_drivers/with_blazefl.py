"""BlazeFL: ``blazefl.contrib.fedavg``, its server handler and its serial client trainer.

It has no fine-tuning of its own: the trainer trains each client for more epochs from the weights
sent, and ``evaluate`` judges before and after.
"""

from __future__ import annotations

import functools
from enum import StrEnum

import torch
from blazefl.contrib.fedavg import (
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgPartitionType,
)
from blazefl.core import ModelSelector, PartitionedDataset, serialize_model
from torch.utils.data import DataLoader, Dataset, TensorDataset
from work import CLIENTS, EPOCHS, RATE, Net, Stopwatch, Weights, client, serve, start


class Name(StrEnum):
    NET = "net"


class Selector(ModelSelector[Name]):
    def select_model(self, model_name: Name) -> Net:
        return start()


class Clients(PartitionedDataset[FedAvgPartitionType]):
    def __init__(self) -> None:
        kept = FedAvgPartitionType
        people = [client(i) for i in range(CLIENTS)]
        self.parts: dict[tuple[str, int | None], Dataset] = {
            (kept.TRAIN, i): TensorDataset(one.x, one.y) for i, one in enumerate(people)
        }
        for i, one in enumerate(people):
            self.set_dataset(kept.TEST, i, TensorDataset(one.test_x, one.test_y))

    def get_dataset(self, type_: FedAvgPartitionType, cid: int | None) -> Dataset:
        return self.parts[type_, cid]

    def set_dataset(self, type_: FedAvgPartitionType, cid: int | None, dataset: Dataset) -> None:
        self.parts[type_, cid] = dataset

    def get_dataloader(
        self,
        type_: FedAvgPartitionType,
        cid: int | None,
        batch_size: int | None,
        generator: torch.Generator | None,
    ) -> DataLoader:
        return DataLoader(
            self.get_dataset(type_, cid),
            batch_size=batch_size,
            shuffle=type_ == FedAvgPartitionType.TRAIN,
            generator=generator,
        )


@functools.cache
def dataset() -> Clients:
    return Clients()


def trainer(count: int, epochs: int, batch: int) -> FedAvgBaseClientTrainer:
    return FedAvgBaseClientTrainer(
        model_selector=Selector(), model_name=Name.NET, dataset=dataset(), device="cpu",
        num_clients=count, epochs=epochs, batch_size=batch, lr=RATE, seed=0,
    )  # fmt: skip


def rounds(watch: Stopwatch, count: int, number: int, batch: int) -> Weights:
    handler = FedAvgBaseServerHandler(
        model_selector=Selector(), model_name=Name.NET, dataset=dataset(), global_round=number,
        num_clients=count, sample_ratio=1.0, device="cpu", batch_size=batch, seed=0,
    )  # fmt: skip
    local = trainer(count, 1, batch)
    watch.start()
    while not handler.if_stop():
        sampled = handler.sample_clients()
        local.local_process(handler.downlink_package(), sampled)
        for package in local.uplink_package():
            handler.load(package)
    watch.stop()
    return dict(handler.model.state_dict())


def tune(watch: Stopwatch, count: int, batch: int) -> list[float]:
    local, losses = trainer(count, EPOCHS, batch), []
    sent, model, judge = serialize_model(start()), start(), FedAvgBaseServerHandler.evaluate
    watch.start()
    for i in range(count):
        tests = dataset().get_dataloader(FedAvgPartitionType.TEST, i, 32, None)
        examples = dataset().get_dataloader(
            FedAvgPartitionType.TRAIN, i, batch, local.rng_suite.torch_cpu
        )
        judge(model, tests, "cpu")
        local.train(sent, examples, i)
        losses.append(judge(local.model, tests, "cpu")[0])
    watch.stop()
    return losses


if __name__ == "__main__":
    serve(rounds, tune)
