"""FedPer: the body is averaged, every client keeps a head of its own.

Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization Layers", 2019,
arXiv 1912.00818, algorithms 1 (server) and 2 (client). A client trains the received body (base
layers) and its own head (personalization layers) together; the body is averaged by number of
examples, the head stays.

Personalization is one more client update, over the epochs of fine-tuning: the final body and the
client's head train together. A client never seen has no head, and no head ever travelled: it starts
one from the initial weights.

Departures: the head is the last linear layer or a module that is named (the paper varies how many
layers and blocks stay); it starts from the initial weights that all clients share, where the
paper's clients draw their own; the norms of the body travel with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.methods.base.local_sgd import LocalSGD
from fedl2p.methods.base.tensor_groups import head_tensors


@dataclass(frozen=True, kw_only=True)
class FedPer(LocalSGD):
    """Federated averaging of the body; heads stay.

    Parameters
    ----------
    head
        Name of the module that is the head; None for the linear layer that is called last.
    """

    head: str | None = None

    def kept_names(self, net: FunctionalModel) -> frozenset[str]:
        """Return the head."""
        return head_tensors(net, self.name, self.head)


METHODS = {
    "fedper": lambda s: FedPer(
        name="fedper",
        local=s.local,
        inner=s.finetune,
        rate=s.personal_rate,
        head=s.baselines.head,
    )
}
