"""Fine-tuning with one fixed mix and one fixed learning rate for every client.

What most people do today: take the pre-trained model and run SGD on the client's own data, with the
global batch-norm statistics (mix 0), the client's (mix 1), or any fixed mix between.

Two variants train a part only, and leave every other tensor as it is in the global model:

- ``finetuning-head``, the last linear layer (linear probing: Kumar, Raghunathan, Jones, Ma, Liang,
  "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022,
  arXiv 2202.10054). Norms keep the global statistics, in training too.
- ``finetuning-norms``, weights, biases and statistics of the batch-norm layers (Frankle, Schwab,
  Morcos, "Training BatchNorm and Only BatchNorm", ICLR 2021, arXiv 2003.00152; they start from
  random weights, we from the global model).

Both use the rate of the further baselines (``baselines.rate``), since the few tensors that they
train need larger steps than whole models. Departures: plain SGD, a fixed number of epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Outcome, State
from fedl2p.methods.base.personalizing import WithoutRounds, choose_constant, personalize_with
from fedl2p.methods.base.settings import Settings
from fedl2p.methods.base.tensor_groups import head_tensors, norm_tensors

TrainedPart = Literal["all", "head", "norms"]


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
    only
        What trains: everything, the head, or the norms.
    head
        Name of the module that is the head; None for the linear layer that is called last.
    """

    mix: float
    rate: float
    inner: InnerLoop
    only: TrainedPart = "all"
    head: str | None = None

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        """Return an empty state; refuse a model without the part that trains."""
        self._trainable_names(working_copies(model).net)
        return {}

    def _trainable_names(self, net: FunctionalModel) -> frozenset[str] | None:
        if self.only == "all":
            return None
        if self.only == "head":
            return head_tensors(net, self.name, self.head)
        return norm_tensors(net, self.name)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Fine-tune every client with the same hyperparameters."""
        net = working_copies(model).net
        net.examine(clients[0].data.train.x)
        choose = choose_constant(net, self.mix, self.rate, self._trainable_names(net))
        return personalize_with(model, clients, self.inner, choose)


def _fixed(name: str, mix: float) -> Callable[[Settings], FineTuning]:
    return lambda s: FineTuning(name=name, mix=mix, rate=s.finetune_rate, inner=s.finetune)


def _partial(name: str, mix: float, only: TrainedPart) -> Callable[[Settings], FineTuning]:
    return lambda s: FineTuning(
        name=name,
        mix=mix,
        rate=s.personal_rate,
        inner=s.finetune,
        only=only,
        head=s.baselines.head,
    )


METHODS = {
    "finetuning-global": _fixed("finetuning-global", 0.0),
    "finetuning-half": _fixed("finetuning-half", 0.5),
    "finetuning-client": _fixed("finetuning-client", 1.0),
    "finetuning-head": _partial("finetuning-head", 0.0, "head"),
    "finetuning-norms": _partial("finetuning-norms", 1.0, "norms"),
}
