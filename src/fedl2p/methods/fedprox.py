"""FedProx: FedAvg with a proximal term that keeps clients near the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020, arXiv 1812.06127, algorithm 2. A client minimises its loss plus (mu / 2) ||w - w^t||^2,
where w^t is the received model (equation 2); the server averages as in FedAvg.

``fedprox`` is the paper's: one model for all, so nobody is personalized, and accuracy before and
after are the same. ``fedprox-finetuning`` fine-tunes all of that model on every client, as FedProx
enters tables of personalization.

Departures: the term is taken implicitly (:mod:`fedl2p.methods.base.proximal`), since the explicit
step diverges for large mu; clients are drawn uniformly and weighted by examples in the average, as
for all methods here, where the paper draws by size and averages plainly; every client does the same
number of epochs (the paper lets slow ones do fewer); running statistics are not held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.method import Client, State
from fedl2p.methods.base.local_sgd import LocalSGD, RoundResult, loss_gradient, run_local_sgd
from fedl2p.methods.base.proximal import damped, pulled
from fedl2p.methods.base.settings import Settings
from fedl2p.methods.base.tensor_groups import client_states


@dataclass(frozen=True, kw_only=True)
class FedProx(LocalSGD):
    """Federated averaging with a proximal term.

    Parameters
    ----------
    mu
        Weight of the term, >= 0; 0 is FedAvg.
    """

    mu: float

    @property
    def unequal_sizes(self) -> bool:
        """No: it follows a gradient of its own."""
        return False

    def train_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> RoundResult:
        """Train clients of equal shapes for one round, near the received model."""
        start = client_states(net, state, clients)
        loss = loss_gradient(net, clients, self.round_loop, "local")
        trained = run_local_sgd(
            net,
            start,
            clients,
            self.round_loop,
            damped(self.local.rate_in(clients[0].round), self.mu),
            gradient=pulled(loss, start.params, self.mu),
        )
        return RoundResult(trained, [{}] * len(clients))


def _finetuned(settings: Settings) -> FedProx:
    return FedProx(
        name="fedprox-finetuning",
        local=settings.local,
        mu=settings.baselines.fedprox_mu,
        inner=settings.finetune,
        rate=settings.personal_rate,
    )


METHODS = {
    "fedprox": lambda s: FedProx(name="fedprox", local=s.local, mu=s.baselines.fedprox_mu),
    "fedprox-finetuning": _finetuned,
}
