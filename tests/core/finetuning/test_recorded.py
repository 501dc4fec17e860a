"""Recorded inner steps: the same numbers, from tensors that stay where they are.

Instead of as a CUDA graph, which needs a GPU, steps are recorded as a graph of torch operations on
these very tensors (``make_fx``). Like a CUDA graph it knows nothing of Python: what is read from a
new tensor instead of the recorded one is not seen, and a number of a first run stays.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.core.finetuning.in_place_sgd import down
from fedl2p.core.finetuning.inner_loop import batches_of, finetune, run_inner_loop
from fedl2p.core.finetuning.stacking import resident
from fedl2p.core.functional import model as net_module
from fedl2p.core.functional.model import Net
from fedl2p.core.functional.precision import Recorder, Work, computing, record_cuda, recorder_of
from fedl2p.core.hypergradients.estimators import cohort_hypergradient
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import MODES, Compute, HypergradientConfig, InnerLoop
from fedl2p.data.digits import Digits
from fedl2p.method import Client
from fedl2p.methods import build
from fedl2p.methods.base.settings import Settings
from fedl2p.study.engines import device_of
from fedl2p.study.settings import Study
from support.core_nets import ConvNet, examples, mlp, settled
from support.nets import nested_net

GRAPHS = Compute(graphs=True)
INNER = InnerLoop(epochs=3, batch_size=8)


class Tape:
    """Records work as torch operations; counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Work) -> tuple[Callable[[], None], list[Tensor]]:
        self.recorded += 1
        work()
        graph = make_fx(work)()
        with torch.no_grad():
            filled = [t.clone() for t in graph()]

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for tensor, value in zip(filled, graph(), strict=True):
                    tensor.copy_(value)

        return replay, filled


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    made = Tape()

    def recorder(compute: Compute, device: torch.device) -> Recorder | None:
        return made if compute.graphs else None

    monkeypatch.setattr(net_module, "recorder_of", recorder)
    return made


def data(seed: int, n: int = 20) -> ClientData:
    train = Examples(*examples(n, 2, 5, 5, seed=seed))
    return ClientData(train, Examples(*examples(6, 2, 5, 5, seed=seed + 50)))


def uneven(net: Net, clients: int, seed: int = 0) -> Hyperparams:
    rng = torch.Generator().manual_seed(seed)
    norms, params = len(net.sites.norms), len(net.sites.params)
    mix = 0.2 + 0.6 * torch.rand(clients, norms, generator=rng, dtype=torch.float64)
    rate = 0.02 + 0.06 * torch.rand(clients, params, generator=rng, dtype=torch.float64)
    return Hyperparams(mix, rate, net.sites)


def nets() -> tuple[Net, Net]:
    plain = settled(ConvNet(2))
    return Net(plain), Net(computing(plain, GRAPHS))


def batches(net: Net, seeds: list[int]) -> EpochBatches:
    return batches_of(net, [data(s) for s in seeds], seeds, INNER)


def test_a_descent_that_is_recorded_once_serves_other_clients(tape: Tape) -> None:
    plain, recorded = nets()
    for seed in range(3):
        states = [
            run_inner_loop(n, uneven(n, 1, seed), batches(n, [seed]), statistics=kind)
            for n in (plain, recorded)
            for kind in ("corrected",)
        ]
        for name, value in {**states[0].params, **states[0].stats}.items():
            ours = {**states[1].params, **states[1].stats}[name]
            torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-14)
    assert tape.recorded == 2  # batches of 8 and of 4
    assert tape.replayed == 3 * 3 * 3


def test_a_stack_is_recorded_too(tape: Tape) -> None:
    plain, recorded = nets()
    for first in (0, 4):
        seeds = [first, first + 1, first + 2]
        states = [
            run_inner_loop(n, uneven(n, 3, first), batches(n, seeds), statistics="published")
            for n in (plain, recorded)
        ]
        for name, value in {**states[0].params, **states[0].stats}.items():
            ours = {**states[1].params, **states[1].stats}[name]
            torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-14)
    assert (tape.recorded, tape.replayed) == (2, 2 * 9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clients", [1, 2])
def test_hypergradients(tape: Tape, mode: str, clients: int) -> None:
    plain, recorded = nets()
    config = HypergradientConfig(mode=mode, steps=2)
    for seed in range(2):
        seeds = [seed + i for i in range(clients)]
        validation = [data(s).validation for s in seeds]
        pair = (
            torch.stack([e.x for e in validation if e]),
            torch.stack([e.y for e in validation if e]),
        )
        made = [
            cohort_hypergradient(
                n, uneven(n, clients, seed), batches(n, seeds), pair, config=config
            )
            for n in (plain, recorded)
        ]
        for ours, expected in zip(vars(made[1]).values(), vars(made[0]).values(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert (tape.recorded > 0) == (mode != "unrolled")


@pytest.mark.parametrize("name", ["fedl2p", "fedavg", "fedrep", "gridsearch", "finetuning-head"])
def test_methods(tape: Tape, name: str) -> None:
    people = []
    for i, n in enumerate((20, 20, 20)):
        parts = [
            Examples(*examples(k, 2, 5, 5, seed=10 * i + j, dtype=torch.float32))
            for j, k in enumerate((n, 6, 6))
        ]
        people.append(Client(f"c{i}", ClientData(*parts), seed=i))
    results = []
    for compute in (Compute(), GRAPHS):
        model = computing(settled(ConvNet(2), dtype=torch.float32), compute)
        method = build(name, Settings(finetune=INNER))
        state = method.start(model, seed=0)
        updates = method.train(model, state, people)
        outcomes = method.personalize(model, state, people)
        results.append(([u.shared for u in updates], [o.loss for o in outcomes]))
    for ours, expected in zip(results[1][0], results[0][0], strict=True):
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4)
    assert (tape.recorded > 0) == (name != "fedrep")  # whose frozen parts are the round's


def test_a_result_outlives_the_next_descent(tape: Tape) -> None:
    _, recorded = nets()
    first = run_inner_loop(
        recorded, uneven(recorded, 1), batches(recorded, [0]), statistics="global"
    )
    before = {k: v.clone() for k, v in {**first.params, **first.stats}.items()}
    run_inner_loop(recorded, uneven(recorded, 1, 9), batches(recorded, [5]), statistics="global")
    for name, value in before.items():
        assert torch.equal({**first.params, **first.stats}[name], value)


def test_one_that_is_in_use_is_left_alone(tape: Tape) -> None:
    _, recorded = nets()
    hyper = uneven(recorded, 1)
    with down(recorded, recorded.start(1), hyper.mix, hyper.rate) as outer:
        with down(recorded, recorded.start(1), hyper.mix, hyper.rate) as inner:
            assert inner is not outer
        again = down(recorded, recorded.start(1), hyper.mix, hyper.rate)
        assert again is not outer
    assert down(recorded, recorded.start(1), hyper.mix, hyper.rate) is outer


def test_other_frozen_tensors_than_the_nets_are_not_recorded(tape: Tape) -> None:
    _, recorded = nets()
    hyper, start = uneven(recorded, 1), recorded.start(1)
    name = recorded.sites.params[0]
    moved = {**start.params, name: start.params[name] + 1}
    rest = [k for k in start.params if k != name]
    way = down(recorded, type(start)(moved, start.stats), hyper.mix, hyper.rate, wanted=rest)
    assert way._record is None
    assert down(recorded, start, hyper.mix, hyper.rate, wanted=rest)._record is tape


def test_dropout_and_norms_of_another_dtype_are_not_recorded(tape: Tape) -> None:
    with_dropout = torch.nn.Sequential(mlp(), torch.nn.Dropout(0.5))
    assert Net(computing(with_dropout, GRAPHS)).recorder is None
    mixed = settled(ConvNet(2), dtype=torch.float32)
    mixed.norm1.running_mean, mixed.norm1.running_var = (
        mixed.norm1.running_mean.double(),
        mixed.norm1.running_var.double(),
    )
    assert Net(computing(mixed, GRAPHS)).recorder is None
    assert Net(computing(mlp(), GRAPHS)).recorder is tape
    assert Net(mlp()).recorder is None


def test_without_cuda_graphs_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"compute\.graphs is for CUDA, but the device is cpu"):
        recorder_of(GRAPHS, torch.device("cpu"))
    assert recorder_of(GRAPHS, torch.device("cuda")) is record_cuda
    study = Study(data=Digits(), device="cpu", compute=GRAPHS)
    with pytest.raises(ValueError, match=r"compute\.graphs is for CUDA"):
        device_of(study)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda() -> None:
    x, y = examples(24, 1, 8, 8, dtype=torch.float32, classes=10)
    tuned = []
    for compute in (Compute(), GRAPHS):
        model = computing(nested_net(), compute).cuda()
        hyper = Hyperparams.constant(Net(model).sites, mix=0.5, rate=0.02)
        tuned.append(finetune(model, hyper, (x, y), epochs=3, batch_size=8).state_dict())
        assert bool(resident(model).net.recorder) == compute.graphs
    for name, value in tuned[0].items():
        torch.testing.assert_close(tuned[1][name], value, rtol=1e-3, atol=1e-5)
