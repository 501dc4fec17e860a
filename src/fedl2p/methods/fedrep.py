"""FedRep: a common representation under heads of the clients' own, trained in turns.

Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized
Federated Learning", ICML 2021, arXiv 2102.07078, algorithm 1. In a round a client first trains its
head for several epochs with the received body frozen, then the body for the local epochs with the
new head frozen; the body is averaged, the head stays.

Personalization trains the head alone, over the final body, for the epochs of fine-tuning: that is
how the paper takes in new clients. A seen client goes on with its head; one never seen starts a
head from the initial weights, since no head ever travelled.

Departures: plain SGD without momentum, as in all methods here; heads start from the initial weights
that all clients share. A frozen body has frozen parameters: its batch-norm layers still normalise
with the batch in training, and their running statistics follow, as in PyTorch's training mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.method import Client, State
from fedl2p.methods.base.local_sgd import LocalSGD, RoundResult, finetune_plain, run_local_sgd
from fedl2p.methods.base.personalizing import PersonalModels
from fedl2p.methods.base.tensor_groups import client_states, head_tensors


@dataclass(frozen=True, kw_only=True)
class FedRep(LocalSGD):
    """Federated averaging of the body; heads stay and train first.

    Parameters
    ----------
    head_epochs
        Epochs of the head in a round.
    head
        Name of the module that is the head; None for the linear layer that is called last.
    """

    head_epochs: int
    head: str | None = None

    def kept_names(self, net: FunctionalModel) -> frozenset[str]:
        """Return the head."""
        return head_tensors(net, self.name, self.head)

    def train_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> RoundResult:
        """Train the heads, then the bodies, of a stack of clients."""
        head, rate = self.kept_names(net), self.local.rate_in(clients[0].round)
        first = replace(self.round_loop, epochs=self.head_epochs)
        start = client_states(net, state, clients)
        headed = run_local_sgd(net, start, clients, first, rate, only=head, stream="head")
        body = set(net.sites.params) - head
        trained = run_local_sgd(net, headed, clients, self.round_loop, rate, only=body)
        return RoundResult(trained, self.kept_tensors(net, trained, len(clients)))

    def personalize_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> PersonalModels:
        """Train the heads of a stack of clients over the final body."""
        start = client_states(net, state, clients)
        return finetune_plain(net, start, clients, self.inner, self.rate, only=self.kept_names(net))


METHODS = {
    "fedrep": lambda s: FedRep(
        name="fedrep",
        local=s.local,
        head_epochs=s.baselines.fedrep_head_epochs,
        inner=s.finetune,
        rate=s.personal_rate,
        head=s.baselines.head,
    )
}
