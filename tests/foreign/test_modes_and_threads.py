"""Modes mean one thing, draws can be repeated, heads are found, every method works one by one."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p import (
    Client,
    ClientData,
    Examples,
    Hyperparams,
    InnerLoop,
    Settings,
    find_sites,
    finetune,
    hypergradient,
)
from fedl2p.core.working_copies import working_copies
from fedl2p.methods import build, names
from fedl2p.methods.base.settings import Baselines, Grid
from foreign.nets import CASES
from foreign.nets.randomness import Drawing, dropped
from foreign.nets.structure import Base, TrainOverride

SETTINGS = Settings(
    finetune=InnerLoop(epochs=1, batch_size=4),
    finetune_rate=0.01,
    local_epochs=1,
    grid=Grid(mixes=(0.5,), rates=(0.01, 0.05)),
    alone_steps=1,
)


def data(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.arange(n) % 3


def constant(model: nn.Module) -> Hyperparams:
    return Hyperparams.constant(find_sites(model), mix=0.5, rate=0.1)


def values(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(ours), values(theirs), strict=True))


def test_submodules_in_evaluation_mode_stay_so_whatever_was_called_before() -> None:
    torch.manual_seed(0)
    model = Base()
    free = finetune(model, constant(model), data(), epochs=1)
    model.n.eval()
    frozen = finetune(model, constant(model), data(), epochs=1)
    assert torch.equal(frozen.n.running_mean, model.n.running_mean)
    assert not same(frozen, free)
    method = build("finetuning-half", SETTINGS)
    client = Client("c", ClientData(*(Examples(*data(12, i)) for i in range(3))), seed=1)
    (once,) = method.personalize(model, {}, [client])
    model.train()
    (trained,) = method.personalize(model, {}, [client])
    assert once.loss != trained.loss
    model.n.eval()
    (again,) = method.personalize(model, {}, [client])
    assert again.loss == once.loss
    model.eval()  # as a whole: then it trains as a whole
    (whole,) = method.personalize(model, {}, [client])
    assert whole.loss == trained.loss


def test_a_train_override_is_honoured_in_every_call() -> None:
    torch.manual_seed(0)
    model = TrainOverride()
    answers = [
        hypergradient(model, constant(model), [data()], data(6, 1), mode="unrolled")
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert answers[0]["mix"] == {"n": 0.0}, "nothing of the client enters a frozen norm"


@pytest.mark.parametrize("statistics", ["corrected", "published", "global"])
def test_a_frozen_norm_keeps_the_global_statistics(statistics: str) -> None:
    torch.manual_seed(0)
    model = Base()
    model.n.running_mean.normal_()
    model.n.eval()
    tuned = finetune(model, constant(model), data(), epochs=1, statistics=statistics)
    assert torch.equal(tuned.n.running_mean, model.n.running_mean)
    assert torch.equal(tuned.n.running_var, model.n.running_var)


def test_draws_are_the_same_when_a_segment_is_computed_again() -> None:
    from fedl2p import HypergradientConfig

    torch.manual_seed(0)
    model = Drawing(dropped).double()
    batches = [(x.double(), y) for x, y in (data(8, i) for i in range(6))]
    answers = [
        hypergradient(
            model,
            constant(model),
            batches,
            batches[0],
            config=HypergradientConfig(mode="unrolled", segment=segment),
        )
        for segment in (1, 2, 6)
    ]
    for answer in answers[1:]:
        assert answer["rate"] == pytest.approx(answers[0]["rate"], rel=1e-9)


def test_draws_are_the_same_in_threads() -> None:
    torch.manual_seed(0)
    model = Drawing(dropped)
    wanted = finetune(model, constant(model), data(), epochs=3)
    before = torch.get_rng_state()
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not same(finetune(model, constant(model), data(), epochs=3), wanted):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(torch.get_rng_state(), before)


class DrawsAlways(Base):
    """Forgets to say whether it trains, so that evaluation draws too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.dropout(torch.tanh(self.n(self.a(x))), 0.5))


def test_a_model_that_draws_in_evaluation_is_judged_the_same_twice() -> None:
    torch.manual_seed(0)
    model = DrawsAlways()
    method = build("finetuning-half", SETTINGS)
    client = Client("c", ClientData(*(Examples(*data(12, i)) for i in range(3))), seed=1)
    before = torch.get_rng_state()
    losses = {method.personalize(model, {}, [client])[0].loss for _ in range(3)}
    assert len(losses) == 1
    assert torch.equal(torch.get_rng_state(), before)


def clients(name: str, count: int = 4) -> list[Client]:
    case = CASES[name]
    return [
        Client(
            f"c{i}",
            ClientData(*(Examples(*case.examples(n, 100 * i + n)) for n in (9, 5, 4))),
            seed=40 + i,
            round=1,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("net", ["LSTM", "running average", "F.dropout"])
def test_every_method_works_one_by_one(
    net: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, people = CASES[net].build(), clients(net)
    ran = build(method, SETTINGS)
    state = ran.start(model, seed=2)
    if ran.rounds != "none":
        assert all(u.failure is None for u in ran.train(model, state, people))
        assert all(u.failure is None for u in ran.train(model, state, people))
    assert all(o.failure is None for o in ran.personalize(model, state, people))
    said = [r for r in caplog.records if "one by one" in r.getMessage()]
    assert len(said) == (net == "LSTM"), "said once, however many rounds"


class HeadFirst(nn.Module):
    """Defines its head before the layers under it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("method", ["fedper", "fedrep", "fedbabu"])
def test_the_head_is_what_a_forward_pass_calls_last_or_what_is_named(method: str) -> None:
    model = HeadFirst()
    people = [
        Client(f"c{i}", ClientData(*(Examples(*data(9, i)) for _ in range(3))), seed=i, round=1)
        for i in range(3)
    ]
    working_copies(model).net.foresee((5,))
    ran = build(method, SETTINGS)
    state = ran.start(model, seed=0)
    assert set(state) == {"body.weight", "body.bias"}
    assert all(set(u.shared) == set(state) for u in ran.train(model, state, people))
    named = build(method, Settings(baselines=Baselines(head="body")))
    assert set(named.start(model)) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="head is 'tail', but the model has no module"):
        build(method, Settings(baselines=Baselines(head="tail"))).start(model)


def test_a_state_that_was_parted_elsewhere_is_refused() -> None:
    model = HeadFirst()
    client = Client("c", ClientData(*(Examples(*data(9, i)) for i in range(3))), seed=1, round=1)
    state = build("fedper", SETTINGS).start(model)  # nobody ran the model: a guess
    assert set(state) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="name the head by head="):
        build("fedper", SETTINGS).train(model, state, [client])
