"""The model and the data: handwritten digits, each client's seen through a sensor of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedl2p import ClientData, Examples
from fedl2p.data.digits import Digits

PARTS = ("train", "validation", "test")


def make_model() -> nn.Module:
    """Return the global model, with the same initial weights everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def load_data(context: Context) -> ClientData:
    """Return a node's data: the file of ``data-path``, or its partition in a simulation.

    The file is an .npz of ``x_train`` (n, 1, 8, 8) float32, ``y_train`` (n,) integers, and the same
    for ``validation`` and ``test``.
    """
    if "data-path" in context.node_config:
        with np.load(Path(str(context.node_config["data-path"])).expanduser()) as file:
            return ClientData(*(pair(file[f"x_{part}"], file[f"y_{part}"]) for part in PARTS))
    number, nodes = (int(context.node_config[k]) for k in ("partition-id", "num-partitions"))
    clients = Digits(seen=nodes, unseen=0, train=64, validation=32, test=48).open(0)
    return clients.open(clients.seen[number])


def pair(x: np.ndarray, y: np.ndarray) -> Examples:
    """Return inputs and labels as tensors."""
    return Examples(torch.from_numpy(x), torch.from_numpy(y))


def train(model: nn.Module, data: ClientData, *, epochs: int, rate: float) -> float:
    """Train a model in place and return its mean loss in the last epoch."""
    loader = DataLoader(TensorDataset(data.train.x, data.train.y), batch_size=16, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    model.train()
    for _ in range(epochs):
        total = 0.0
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(loader)


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the fraction of examples that a model gets right."""
    model.eval()
    return (model(examples.x).argmax(1) == examples.y).float().mean().item()
