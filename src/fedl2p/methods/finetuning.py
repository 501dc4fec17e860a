"""Fine-tuning with one fixed mix and one fixed learning rate for every client.

What most people do today: take the pre-trained model and run SGD on the client's own data, with the
global batch-norm statistics (mix 0), the client's (mix 1), or any fixed mix between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fedl2p.core.cohort import resident
from fedl2p.core.innerloop import InnerLoop
from fedl2p.method import Client, Outcome, State
from fedl2p.methods.common import WithoutRounds, constant_for, personalize_with
from fedl2p.methods.settings import Settings


@dataclass(frozen=True, kw_only=True)
class FineTuning(WithoutRounds):
    """Plain fine-tuning; nothing travels.

    Parameters
    ----------
    mix
        0 = global statistics, 1 = the client's.
    rate
        Learning rate of every parameter tensor.
    inner
        Epochs and batch size.
    """

    mix: float
    rate: float
    inner: InnerLoop

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Fine-tune every client with the same hyperparameters."""
        choose = constant_for(resident(model).net, self.mix, self.rate)
        return personalize_with(model, clients, self.inner, choose)


def _fixed(name: str, mix: float) -> Callable[[Settings], FineTuning]:
    return lambda s: FineTuning(name=name, mix=mix, rate=s.finetune_rate, inner=s.finetune)


METHODS = {
    "finetuning-global": _fixed("finetuning-global", 0.0),
    "finetuning-half": _fixed("finetuning-half", 0.5),
    "finetuning-client": _fixed("finetuning-client", 1.0),
}
