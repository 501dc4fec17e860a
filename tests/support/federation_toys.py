"""A small method with results in closed form, and a population for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.data.population import Population
from fedl2p.method import Client, Method, Outcome, State, Update


class Line(Population):
    """Client ``c<i>`` holds ``i + 1`` copies of the point ``(i, -i)``."""

    classes = 2
    shape = (2,)

    def __init__(self, seen: int = 5, unseen: int = 0, broken: Sequence[str] = ()) -> None:
        names = tuple(f"c{i}" for i in range(seen + unseen))
        self.seen, self.unseen = names[:seen], names[seen:]
        self.broken = broken

    def open(self, name: str) -> ClientData:
        if name in self.broken:
            raise OSError(f"the file of {name} is gone")
        i = int(name[1:])
        x = torch.tensor([[i, -i]], dtype=torch.float64).repeat(i + 1, 1)
        return ClientData(Examples(x, torch.zeros(i + 1, dtype=torch.int64)))

    def point(self, name: str) -> Tensor:
        return self.open(name).train.x[0]

    def weighted_mean(self, names: Sequence[str]) -> Tensor:
        weights = torch.tensor([float(n[1:]) + 1 for n in names], dtype=torch.float64)
        points = torch.stack([self.point(n) for n in names])
        return (points * weights[:, None]).sum(0) / weights.sum()


@dataclass(frozen=True, kw_only=True)
class Toward(Method):
    """Each client moves the travelling point a step toward its own; kept counts its visits.

    With ``rate`` 1 a round of FedAvg gives the weighted mean of the clients' points. ``noise`` adds
    seeded noise, so that seeds matter; ``bad`` clients answer what ``how`` says.
    """

    name: str = "toward"
    rate: float = 1.0
    noise: float = 0.0
    use_kept: bool = False
    bad: tuple[str, ...] = ()
    how: str = "failure"

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        return {
            "point": torch.zeros(2, dtype=torch.float64),
            "half": torch.zeros(3, dtype=torch.bfloat16),
            "count": torch.tensor(0),
            "scale": torch.tensor(1.0),
        }

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        return [self._one(state, client) for client in clients]

    def _one(self, state: State, client: Client) -> Update:
        x = client.data.train.x
        step = self.rate * (x.mean(0) - state["point"])
        if self.noise:
            g = torch.Generator().manual_seed(client.seed)
            step = step + self.noise * torch.randn(2, generator=g, dtype=torch.float64)
        visits = client.kept.get("visits", torch.tensor(0)) + 1
        if self.use_kept:
            step = step / visits
        loss = float((x.mean(0) - state["point"]).square().sum())
        shared = {
            "point": state["point"] + step,
            "half": state["half"] + 1,
            "count": state["count"] + 2,
            "scale": state["scale"] * 2,
        }
        update = Update(
            client.name,
            shared,
            {"visits": visits},
            float(len(x)),
            {"loss": loss, "accuracy": 1 / (1 + loss)},
        )
        return spoil(update, self.how) if client.name in self.bad else update

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        return [
            Update(u.client, weight=u.weight, metrics=u.metrics, failure=u.failure)
            for u in Toward().train(model, state, clients)
        ]

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        return [
            Outcome(
                client=c.name,
                num_train=len(c.data.train.x),
                num_test=int(c.kept.get("visits", torch.tensor(0))),
                accuracy_before=0.0,
                accuracy=0.5,
                loss_before=1.0,
                loss=float(state["point"][0]),
                seconds=0.0,
                failure="no luck" if c.name in self.bad else None,
            )
            for c in clients
        ]


def spoil(update: Update, how: str) -> Update:
    """Return the same answer with one thing wrong."""
    shared, weight, failure = dict(update.shared), update.weight, None
    metrics = dict(update.metrics)
    match how:
        case "raise":
            raise ArithmeticError("it exploded\nwith a long trace")
        case "failure":
            failure = "the inner loop diverged"
        case "nan":
            shared["point"] = shared["point"] * float("nan")
        case "infinity":
            shared["scale"] = shared["scale"] / 0
        case "missing":
            del shared["count"]
        case "extra":
            shared["more"] = torch.zeros(1)
        case "shape":
            shared["point"] = shared["point"][:1]
        case "dtype":
            shared["point"] = shared["point"].float()
        case "weight":
            weight = 0.0
        case "negative":
            weight = -3.0
        case "loss":
            metrics["loss"] = float("nan")
    return Update(update.client, shared, update.kept, weight, metrics, failure)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def same(a: State, b: State) -> bool:
    """Whether two states agree bit for bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )
