"""FedBN: FedAvg in which batch-norm never leaves the client.

Li, Jiang, Zhang, Kamp, Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch
Normalization", ICLR 2021, arXiv 2102.07623, algorithm 1. Weights, biases and running statistics of
all batch-norm layers stay; everything else is averaged. The layers are found by type, at any depth.

``fedbn`` is the paper's: a seen client uses the final average with its own norms, without
fine-tuning. The norms of a client never seen (or never drawn) do not exist; it makes them from its
own data: it trains them alone, from their initial weights and with fresh statistics, for the epochs
of fine-tuning, while all the rest stays as received. So nothing of any norm ever travels. (The
authors advise averaged norms or statistics of the new client's own for such clients; averaging
would let them travel.) Before that, an unseen client's norms are the initial ones.

``fedbn-finetuning`` fine-tunes everything, on seen and unseen clients alike.

Departures: the average is weighted by examples, as in FedAvg; the count of batches is not kept, as
nothing reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.method import Client, State
from fedl2p.methods.base.local_sgd import LocalSGD, finetune_plain
from fedl2p.methods.base.personalizing import PersonalModels, constant_mix
from fedl2p.methods.base.settings import Settings
from fedl2p.methods.base.tensor_groups import client_states, norm_tensors, where


@dataclass(frozen=True, kw_only=True)
class FedBN(LocalSGD):
    """Federated averaging of all but the norms.

    Parameters
    ----------
    finetune
        Whether every client fine-tunes all of its model; if not, unseen ones train norms alone.
    """

    finetune: bool

    def kept_names(self, net: FunctionalModel) -> frozenset[str]:
        """Return everything that belongs to batch-norm layers."""
        return norm_tensors(net, self.name)

    def personalize_stack(
        self, net: FunctionalModel, state: State, clients: Sequence[Client]
    ) -> PersonalModels:
        """Use a seen client's norms; train those of an unseen one."""
        start = client_states(net, state, clients)
        if self.finetune:
            return finetune_plain(net, start, clients, self.inner, self.rate)
        without = torch.tensor([not c.kept for c in clients], device=net.device)
        if not bool(without.any()):
            return PersonalModels(start, constant_mix(net, len(clients), 1.0))
        norms = self.kept_names(net)
        trained = finetune_plain(net, start, clients, self.inner, self.rate, only=norms)
        return PersonalModels(where(without, trained.state, start), trained.mix)


def _fedbn(settings: Settings, name: str, *, finetune: bool) -> FedBN:
    return FedBN(
        name=name,
        local=settings.local,
        finetune=finetune,
        inner=settings.finetune,
        rate=settings.personal_rate,
    )


METHODS = {
    "fedbn": lambda s: _fedbn(s, "fedbn", finetune=False),
    "fedbn-finetuning": lambda s: _fedbn(s, "fedbn-finetuning", finetune=True),
}
