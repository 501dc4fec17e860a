"""FedAvg: one model for all by federated averaging; also what pre-trains the global model.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, arXiv 1602.05629, algorithm 1. Clients take local epochs of plain SGD; the server averages all
weights by number of training examples. Departures: batch-norm's running statistics are averaged
like weights (the paper's nets had none), the count of batches and frozen parameters do not travel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fedl2p.core.cohort import evaluate, over_stacks, resident
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.innerloop import InnerLoop, batches_of, finite, on, run_inner_loop
from fedl2p.core.net import Net, NetState
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.common import (
    DIVERGED,
    constant_for,
    metrics_of,
    personalize_with,
    validation_part,
    with_state,
)
from fedl2p.methods.settings import LocalTraining
from fedl2p.seeds import derive_seed


def weights_of(net: Net) -> State:
    """Return what travels: trainable parameters and norm statistics, by ``state_dict`` names."""
    tensors = net.plain.state_dict()
    return {name: tensors[name].detach().cpu().clone() for name in travelling(net)}


def travelling(net: Net) -> list[str]:
    """Return the names of the tensors that travel."""
    stats = [f"{n}.{s}" for n in net.sites.norms for s in ("running_mean", "running_var")]
    return [*net.sites.params, *stats]


def to_net_state(net: Net, state: State, clients: int) -> NetState:
    """Return a state of plain training, in which batch-norm goes on from the given statistics."""
    device = net.device
    held = {k: v.to(device).expand(clients, *v.shape) for k, v in state.items()}
    stats = {}
    for name in net.sites.norms:
        stats[f"{name}.client_mean"] = held[f"{name}.running_mean"]
        stats[f"{name}.client_var"] = held[f"{name}.running_var"]
        stats[f"{name}.client_weight"] = held[f"{name}.running_var"].new_ones(clients)
    return NetState({k: held[k] for k in net.sites.params}, stats)


def from_net_state(net: Net, state: NetState, client: int) -> State:
    """Return one client's tensors that travel."""
    shared = {k: v[client].cpu() for k, v in state.params.items()}
    for name in net.sites.norms:
        shared[f"{name}.running_mean"] = state.stats[f"{name}.client_mean"][client].cpu()
        shared[f"{name}.running_var"] = state.stats[f"{name}.client_var"][client].cpu()
    return shared


def train_plainly(
    net: Net, start: NetState, clients: Sequence[Client], inner: InnerLoop, rate: float
) -> NetState:
    """Train clients of equal shapes with plain batch-norm and plain SGD."""
    plain = Hyperparams.stack([Hyperparams.constant(net.sites, mix=1.0, rate=rate)] * len(clients))
    batches = batches_of(
        net, [c.data for c in clients], [derive_seed(c.seed, "local") for c in clients], inner
    )
    return run_inner_loop(net, on(net, plain), batches, statistics="global", start=start)


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method):
    """Federated averaging from scratch; everybody uses the same model.

    Parameters
    ----------
    local
        Local training of one round.
    """

    local: LocalTraining

    @property
    def starts_from(self) -> Literal["scratch"]:
        """Initial weights."""
        return "scratch"

    @property
    def rounds(self) -> Literal["pretrain"]:
        """As many rounds as pre-training: it is the same thing."""
        return "pretrain"

    def start(self, model: nn.Module, *, seed: int = 0, prepared: State | None = None) -> State:
        """Return the initial weights and norm statistics."""
        return weights_of(resident(model).net)

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Train every client for its local epochs, from the received weights."""
        net = resident(model).net
        inner = InnerLoop(epochs=self.local.epochs, batch_size=self.local.batch_size)
        judged = self.validate(model, state, clients)
        if self.local.reads == "train+validation":
            clients = [dataclasses.replace(c, data=c.data.joined()) for c in clients]

        def stack(members: list[int]) -> list[Update]:
            own = [clients[i] for i in members]
            start = to_net_state(net, state, len(own))
            trained = train_plainly(net, start, own, inner, self.local.rate_in(own[0].round))
            sound = finite(trained).tolist()
            return [
                Update(
                    c.name,
                    shared=from_net_state(net, trained, j),
                    weight=float(len(c.data.train.x)),
                    metrics=judged[i].metrics,
                    failure=None if sound[j] else DIVERGED,
                )
                for j, (i, c) in enumerate(zip(members, own, strict=True))
            ]

        return over_stacks(net, [c.data for c in clients], stack)

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Judge the received weights on every client's validation part."""
        net = resident(model).net
        mix = torch.ones(len(clients), len(net.sites.norms), device=net.device, dtype=net.dtype)
        parts = [validation_part(c) for c in clients]
        scores = evaluate(net, to_net_state(net, state, len(clients)), mix, parts)
        return [
            Update(c.name, weight=float(len(part.x)), metrics=metrics_of(*score))
            for c, part, score in zip(clients, parts, scores, strict=True)
        ]

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Evaluate the averaged model as it is; accuracy before and after are the same."""
        averaged = with_state(model, state)
        choose = constant_for(resident(averaged).net, 0.0, 0.0)
        return personalize_with(averaged, clients, InnerLoop(epochs=0), choose)


METHODS = {"fedavg": lambda s: FedAvg(name="fedavg", local=s.local)}
