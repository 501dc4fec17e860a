"""FedAvg: one model for all clients by federated averaging; also the pre-training of studies.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, arXiv 1602.05629, algorithm 1. Clients take local epochs of plain SGD; the server averages all
weights by number of training examples (:mod:`fedl2p.methods.base.local_sgd`). Departures:
batch-norm's running statistics are averaged like weights (the paper's nets had none), the count of
batches and frozen parameters do not travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Outcome, State
from fedl2p.methods.base.local_sgd import LocalSGD
from fedl2p.methods.base.personalizing import choose_constant, model_with_state, personalize_with


@dataclass(frozen=True, kw_only=True)
class FedAvg(LocalSGD):
    """Federated averaging from scratch; everybody uses the same model."""

    @property
    def trained_by_pretraining(self) -> bool:
        """Yes: pre-training is this method."""
        return True

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Evaluate the averaged model as it is; accuracy before and after are the same."""
        averaged = model_with_state(model, state)
        choose = choose_constant(working_copies(averaged).net, 0.0, 0.0)
        return personalize_with(averaged, clients, InnerLoop(epochs=0), choose)


METHODS = {"fedavg": lambda s: FedAvg(name="fedavg", local=s.local)}
