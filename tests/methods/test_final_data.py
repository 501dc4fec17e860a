"""What the last fine-tuning and local training read: the training part, or validation too."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fedl2p import methods, models
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute, InnerLoop
from fedl2p.data.digits import Digits
from fedl2p.data.pools.client_cache import size_of
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.method import Client
from fedl2p.methods.base.settings import Grid, LocalTraining, Settings

pytest.importorskip("sklearn")

POPULATION = Digits(seen=4, unseen=0, train=20, validation=12, test=16).open(0)
MODEL = models.build("fedl2p.models:small_conv", shape=(1, 8, 8), classes=10, seed=0)
BOTH: Any = "train+validation"


def clients(*, joined: bool = False) -> list[Client]:
    opened = [(name, POPULATION.open(name)) for name in POPULATION.seen]
    return [Client(n, d.joined() if joined else d, seed=i) for i, (n, d) in enumerate(opened)]


def settings(**changes: Any) -> Settings:
    inner = InnerLoop(epochs=2, batch_size=8, final=changes.pop("final", "train"))
    grid = Grid(mixes=(0.0, 1.0), rates=(0.01, 0.1))
    return Settings(finetune=inner, finetune_rate=0.05, local_epochs=2, grid=grid, **changes)


def test_joined_data_has_the_validation_part_twice() -> None:
    data = POPULATION.open("seen-00")
    joined = data.joined()
    assert data.validation is not None
    assert torch.equal(joined.train.x, torch.cat([data.train.x, data.validation.x]))
    assert torch.equal(joined.train.y, torch.cat([data.train.y, data.validation.y]))
    assert joined.validation is data.validation
    assert joined.test is data.test
    alone = ClientData(Examples(data.train.x, data.train.y))
    assert alone.joined() is alone


@pytest.mark.parametrize("name", ["finetuning-client", "local"])
def test_fine_tuning_on_both_parts_equals_that_on_their_union(name: str) -> None:
    both = methods.build(name, settings(final=BOTH)).personalize(MODEL, {}, clients())
    union = methods.build(name, settings()).personalize(MODEL, {}, clients(joined=True))
    less = methods.build(name, settings()).personalize(MODEL, {}, clients())
    for a, b, c in zip(both, union, less, strict=True):
        assert (a.num_train, c.num_train) == (32, 20)
        assert (a.loss, a.accuracy) == (b.loss, b.accuracy)
        assert a.loss != c.loss
        assert a.loss_before == c.loss_before


def test_a_search_still_chooses_on_the_validation_part_alone() -> None:
    """Its choice is the same; only the last fine-tuning reads more."""
    both = methods.build("gridsearch", settings(final=BOTH)).personalize(MODEL, {}, clients())
    less = methods.build("gridsearch", settings()).personalize(MODEL, {}, clients())
    for a, b in zip(both, less, strict=True):
        assert a.hyperparams is not None
        assert b.hyperparams is not None
        assert torch.equal(a.hyperparams.rate, b.hyperparams.rate)
        assert torch.equal(a.hyperparams.mix, b.hyperparams.mix)
    assert [o.loss for o in both] != [o.loss for o in less]


def test_a_round_of_fedavg_on_both_parts_equals_that_on_their_union() -> None:
    local = LocalTraining(rate=0.05, batch_size=8)
    more = dataclasses.replace(local, reads=BOTH)
    method = methods.build("fedavg", settings(local=local))
    state = method.start(MODEL)
    union = method.train(MODEL, state, clients(joined=True))
    both = methods.build("fedavg", settings(local=more)).train(MODEL, state, clients())
    for a, b in zip(both, union, strict=True):
        assert a.weight == b.weight == 32
        assert a.metrics == b.metrics
        assert all(torch.equal(a.shared[k], b.shared[k]) for k in b.shared)


def test_other_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="final is 'test', but must be one of train"):
        InnerLoop(final="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reads is 'test', but must be one of train"):
        LocalTraining(reads="test")  # type: ignore[arg-type]


class Watched:
    """FedAvg that notes how many clients one call was given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.method = methods.build("fedavg", settings(local=LocalTraining(batch_size=8)))
        train = type(self.method).train

        def watch(model: Any, state: Any, given: Any) -> Any:
            self.sizes.append(len(given))
            return train(self.method, model, state, given)

        object.__setattr__(self.method, "train", watch)


@pytest.mark.parametrize(("room", "sizes"), [(100.0, [4]), (2.5, [2, 2]), (0.5, [1, 1, 1, 1])])
def test_one_call_is_given_as_many_clients_as_memory_allows(room: float, sizes: list[int]) -> None:
    """A call holds whole stacks, here of one client; with the data comes the state sent back."""
    state = MODEL.state_dict().values()
    each = size_of(POPULATION.open("seen-00")) + sum(t.nbytes for t in state)
    watched, whole = Watched(), Watched()
    results = []
    for watching, keep_bytes in ((watched, int(room * each)), (whole, None)):
        method = watching.method
        node = ClientNode(
            build=lambda: with_compute(MODEL, Compute(stack_size=1)),
            population=POPULATION,
            methods={"fedavg": method},
            keep_bytes=keep_bytes,
        )
        rounds = Rounds(rounds=1, clients_per_round=0, keep="last")
        done = federate(
            *(method, MODEL, POPULATION),
            rounds=rounds,
            seed=0,
            stage="pretrain",
            clients=InProcess(node),
        )
        results.append(done.state)
    assert watched.sizes[: len(sizes)] == sizes
    for name, tensor in results[1].items():
        torch.testing.assert_close(results[0][name], tensor, rtol=1e-4, atol=1e-5)
