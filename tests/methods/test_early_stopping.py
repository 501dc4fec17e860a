"""Early stopping per client: the state after its best epoch, chosen on its validation part."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client
from fedl2p.methods.base.personalizing import finetune_stack
from support.nets import nested_net


def examples(seed: int, count: int) -> Examples:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=rng, dtype=torch.float64)
    return Examples(x, torch.randint(0, 10, (count,), generator=rng))


def make(seed: int) -> Client:
    return Client(f"c{seed}", ClientData(examples(seed, 24), examples(50 + seed, 16)), seed=seed)


CLIENTS = [make(s) for s in range(3)]


def hyperparams(net: FunctionalModel, rates: list[float]) -> Hyperparams:
    each = [Hyperparams.constant(net.sites, mix=0.7, rate=r) for r in rates]
    return Hyperparams.stack(each).to(net.device, net.dtype)


def validation_losses(net: FunctionalModel, rates: list[float], inner: InnerLoop) -> Tensor:
    h = hyperparams(net, rates)
    state = finetune_stack(net, CLIENTS, h, inner)
    parts = [c.data.validation for c in CLIENTS if c.data.validation is not None]
    return torch.tensor([loss for loss, _ in evaluate(net, state, h.mix, parts)])


def test_it_is_the_best_of_all_epochs() -> None:
    """Fine-tuning for 0 to 6 epochs, each from the start, then the minimum: the same losses."""
    net = working_copies(nested_net(seed=1)).net
    rates = [0.01, 0.1, 0.4]
    each = torch.stack(
        [validation_losses(net, rates, InnerLoop(epochs=e, batch_size=8)) for e in range(7)]
    )
    stopped = validation_losses(net, rates, InnerLoop(epochs=6, batch_size=8, early_stopping=True))
    torch.testing.assert_close(stopped, each.min(0).values)
    assert len(set(each.argmin(0).tolist())) > 1, "the clients should stop at different epochs"
    assert (stopped < each[-1]).any()


def test_a_client_that_diverges_keeps_its_last_good_state() -> None:
    net = working_copies(nested_net(seed=1)).net
    rates = [0.01, 1e38, 0.01]
    losses = validation_losses(net, rates, InnerLoop(epochs=3, batch_size=8, early_stopping=True))
    start = validation_losses(net, rates, InnerLoop(epochs=0))
    assert losses.isfinite().all()
    assert losses[1] == start[1]


def test_without_a_validation_part_nothing_stops() -> None:
    net = working_copies(nested_net(seed=1)).net
    blind = [dataclasses.replace(c, data=ClientData(c.data.train)) for c in CLIENTS]
    h = hyperparams(net, [0.3] * 3)
    plain = finetune_stack(net, blind, h, InnerLoop(epochs=3, batch_size=8))
    stopped = finetune_stack(net, blind, h, InnerLoop(epochs=3, batch_size=8, early_stopping=True))
    for name, value in plain.params.items():
        assert torch.equal(value, stopped.params[name]), name


@pytest.mark.parametrize("stop", [True, False])
def test_the_cohort_does_not_matter(stop: bool) -> None:
    net = working_copies(nested_net(seed=1)).net
    inner = InnerLoop(epochs=4, batch_size=8, early_stopping=stop)
    together = finetune_stack(net, CLIENTS, hyperparams(net, [0.3] * 3), inner)
    for i, client in enumerate(CLIENTS):
        alone = finetune_stack(net, [client], hyperparams(net, [0.3]), inner)
        for name, value in alone.params.items():
            torch.testing.assert_close(value[0], together.params[name][i])


def test_it_cannot_choose_on_what_is_trained_on() -> None:
    with pytest.raises(ValueError, match="not trained on"):
        InnerLoop(early_stopping=True, final="train+validation")
