"""Ditto: beside the global model each client trains a personal one, pulled to the global one.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML
2021, arXiv 2012.04221, algorithm 1. The global model w is trained and averaged exactly as in
FedAvg. A drawn client also trains its personal model v on its loss plus (lambda / 2) ||v - w^t||^2,
with w^t as received; v stays. lambda 0 is local training, a large lambda gives the global model.

Personalization goes on with v for the epochs of fine-tuning, pulled to the final w. A client never
seen starts v from w. Before that, a client is evaluated with w.

Departures: the term is taken implicitly (:mod:`fedl2p.methods.base.proximal`), so that every
lambda is stable; one lambda for all clients, where the paper's choose theirs from three on
validation data; v sees as many batches as w, from a draw of its own. Running statistics are not
pulled: v's norms have statistics of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.method import Client, State
from fedl2p.methods.base.local_sgd import (
    LocalSGD,
    RoundResult,
    loss_gradient,
    run_local_sgd,
    with_fresh_statistics,
)
from fedl2p.methods.base.personalizing import PersonalModels, constant_mix
from fedl2p.methods.base.proximal import damped, pulled
from fedl2p.methods.base.tensor_groups import (
    client_states,
    client_tensors,
    kept_copies,
    tensor_names,
)

PERSONAL = "personal."
"""Prefix of a personal model's tensors among what a client keeps."""


@dataclass(frozen=True, kw_only=True)
class Ditto(LocalSGD):
    """Federated averaging, and a personal model per client.

    Parameters
    ----------
    pull
        lambda, the weight of the term, >= 0.
    """

    pull: float

    @property
    def unequal_sizes(self) -> bool:
        """No: it follows a gradient of its own."""
        return False

    def train_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> RoundResult:
        """Train global and personal models of clients of equal shapes for one round."""
        loop, rate = self.round_loop, self.local.rate_in(clients[0].round)
        received = client_states(net, state, clients)
        trained = run_local_sgd(net, received, clients, loop, rate)
        anchor, start = received.params, client_states(net, {}, clients, prefix=PERSONAL)
        loss = loss_gradient(net, clients, loop, "personal")
        personal = run_local_sgd(
            net,
            start,
            clients,
            loop,
            damped(rate, self.pull),
            gradient=pulled(loss, anchor, self.pull),
        )
        names = tensor_names(net)
        kept = [
            kept_copies(client_tensors(net, personal, j, names), prefix=PERSONAL)
            for j in range(len(clients))
        ]
        return RoundResult(trained, kept)

    def personalize_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> PersonalModels:
        """Train the personal models of clients of equal shapes, near the final global one."""
        anchor = client_states(net, state, clients).params
        start = with_fresh_statistics(
            net, client_states(net, {}, clients, prefix=PERSONAL), self.inner
        )
        loss = loss_gradient(net, clients, self.inner, "finetune")
        personal = run_local_sgd(
            net,
            start,
            clients,
            self.inner,
            damped(self.rate, self.pull),
            gradient=pulled(loss, anchor, self.pull),
        )
        return PersonalModels(personal, constant_mix(net, len(clients), 1.0))


METHODS = {
    "ditto": lambda s: Ditto(
        name="ditto",
        local=s.local,
        pull=s.baselines.ditto_lambda,
        inner=s.plain_sgd_loop("ditto"),
        rate=s.personal_rate,
    )
}
