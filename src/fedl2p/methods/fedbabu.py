"""FedBABU: the federation trains the body alone; the head comes with fine-tuning.

Oh, Kim, Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR
2022, arXiv 2106.06042, algorithm 1. The head, the last linear layer, keeps its random initial
weights on every client while the body is trained and averaged, so that the body learns to serve one
fixed head. For evaluation each client, seen or not, fine-tunes the whole model on its own data (the
paper's "F"; it finds the head alone about as good).

Departures: plain SGD without momentum, as in all methods here; fine-tuning lasts for the setting
``finetune``'s epochs (the paper: 5). The head need not travel: it is the initial model's, which
every client has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.method import Client, State
from fedl2p.methods.base.local_sgd import LocalSGD, RoundResult, run_local_sgd
from fedl2p.methods.base.tensor_groups import client_states, head_tensors


@dataclass(frozen=True, kw_only=True)
class FedBABU(LocalSGD):
    """Federated averaging of a body under a fixed head; everything fine-tunes.

    Parameters
    ----------
    head
        Name of the module that is the head; None for the linear layer that is called last.
    """

    head: str | None = None

    def kept_names(self, net: FunctionalModel) -> frozenset[str]:
        """Return the head."""
        return head_tensors(net, self.name, self.head)

    def train_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> RoundResult:
        """Train the bodies of a stack of clients for one round; nobody keeps anything."""
        trained = run_local_sgd(
            net,
            client_states(net, state, clients),
            clients,
            self.round_loop,
            self.local.rate_in(clients[0].round),
            only=set(net.sites.params) - self.kept_names(net),
        )
        return RoundResult(trained, [{}] * len(clients))


METHODS = {
    "fedbabu": lambda s: FedBABU(
        name="fedbabu",
        local=s.local,
        inner=s.finetune,
        rate=s.personal_rate,
        head=s.baselines.head,
    )
}
