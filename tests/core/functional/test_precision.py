"""Precision and memory layout: what they change, what they leave alone, where they reach."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedl2p import finetune
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.functional.precision import compute_of, with_compute
from fedl2p.core.hypergradients.estimators import hypergradient
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import MODES, PROFILE_GROUPS, Compute, InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.data.digits import Digits
from fedl2p.method import Client
from fedl2p.methods import build
from fedl2p.methods.base.personalizing import kept_profile, profile_of
from fedl2p.methods.base.settings import Settings
from fedl2p.study.engines import node_of
from fedl2p.study.settings import Study
from support.core_nets import ConvNet, examples, settled

BFLOAT16 = Compute(precision="bfloat16")
LAST = Compute(channels_last=True)


def net_of(compute: Compute) -> nn.Module:
    return with_compute(settled(ConvNet(2), dtype=torch.float32), compute)


def clients(count: int) -> list[Client]:
    made = []
    for i in range(count):
        parts = [
            Examples(*examples(n, 2, 6, 6, seed=3 * i + j, dtype=torch.float32))
            for j, n in enumerate((12, 6, 6))
        ]
        made.append(Client(f"c{i}", ClientData(*parts), seed=i))
    return made


def profiled(model: nn.Module, client: Client) -> Profile:
    return profile_of(working_copies(model), client, PROFILE_GROUPS)


@contextmanager
def watched(kind: type[nn.Module]) -> Iterator[list[Tensor]]:
    """Note what modules of a kind return."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: object, output: Tensor) -> None:
        if isinstance(module, kind):
            seen.append(output)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["fedl2p", "fedavg", "gridsearch", "perfedavg"])
@pytest.mark.parametrize("count", [1, 3])
def test_bfloat16_reaches_every_convolution_and_no_weight(name: str, count: int) -> None:
    method = build(name, Settings(finetune=InnerLoop(epochs=2, batch_size=8)))
    results = []
    for compute in (Compute(), BFLOAT16):
        model = net_of(compute)
        state = method.start(model, seed=0)
        people = [replace(c, kept=kept_profile(profiled(model, c))) for c in clients(count)]
        with watched(nn.Conv2d) as seen:
            updates = method.train(model, state, people)
            outcomes = method.personalize(model, state, people)
        dtypes = {t.dtype for t in seen}
        assert dtypes == {torch.float32 if compute == Compute() else torch.bfloat16}
        assert all(v.dtype == torch.float32 for u in updates for v in u.shared.values())
        results.append([o.loss for o in outcomes])
    full, half = torch.tensor(results, dtype=torch.float64)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)
    assert not torch.equal(half, full)


def test_statistics_of_norms_do_not_lose_digits_to_bfloat16() -> None:
    """Those of the first norm are those of bfloat16 activations, computed in float32."""
    x, y = examples(32, 2, 6, 6, dtype=torch.float32)
    net = FunctionalModel(net_of(BFLOAT16))
    hyper = Hyperparams.stack([Hyperparams.constant(net.sites, mix=0.5, rate=0.01)])
    with watched(nn.Conv2d) as seen, InPlaceSGD(net, net.start(1), hyper.mix, hyper.rate) as sgd:
        sgd.step(StackBatch(x[None], y[None]))
    activations = seen[0].detach().double()
    mean, var = activations.mean((0, 2, 3)), activations.var((0, 2, 3))
    stats = sgd.state.stats
    torch.testing.assert_close(
        stats["norm1.client_mean"][0].double(), 0.1 * mean, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(stats["norm1.client_var"][0].double(), 0.1 * var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_hypergradients_in_bfloat16_point_the_same_way(mode: str) -> None:
    batches = [examples(8, 2, 6, 6, seed=k, dtype=torch.float32) for k in range(3)]
    validation = examples(16, 2, 6, 6, seed=9, dtype=torch.float32)
    got = []
    for compute in (Compute(), BFLOAT16):
        model = net_of(compute)
        hyper = Hyperparams.constant(FunctionalModel(model).sites, mix=0.5, rate=0.02)
        made = hypergradient(model, hyper, batches, validation, mode=mode)
        got.append(torch.tensor([*made["rate"].values()]))
    assert float(torch.cosine_similarity(*got, dim=0)) > 0.98
    assert not torch.equal(*got)


@pytest.mark.parametrize("compute", [Compute(), BFLOAT16, LAST])
def test_a_stack_gets_what_its_clients_get_alone(compute: Compute) -> None:
    model = net_of(compute)
    method = build("fedl2p", Settings(finetune=InnerLoop(epochs=2, batch_size=8)))
    state = method.start(model, seed=0)
    people = clients(3)
    tolerance = 0.05 if compute == BFLOAT16 else 1e-4
    for client, ours in zip(people, method.personalize(model, state, people), strict=True):
        alone = method.personalize(model, state, [client])[0]
        assert ours.loss == pytest.approx(alone.loss, rel=tolerance)


def test_channels_last_changes_the_layout_and_nothing_else() -> None:
    data = examples(20, 2, 6, 6, dtype=torch.float32)
    tuned, layouts = [], []
    for compute in (Compute(), LAST):
        model = net_of(compute)
        hyper = Hyperparams.constant(FunctionalModel(model).sites, mix=0.5, rate=0.02)
        with watched(nn.Conv2d) as seen:
            tuned.append(finetune(model, hyper, data, epochs=2, batch_size=8))
        layouts.append({t.is_contiguous(memory_format=torch.channels_last) for t in seen})
    assert layouts == [{False}, {True}]
    first, last = (m.state_dict() for m in tuned)
    for name, value in first.items():
        torch.testing.assert_close(last[name], value, rtol=1e-3, atol=1e-5)


def test_models_with_3d_convolutions_take_channels_last() -> None:
    model = with_compute(ConvNet(3), LAST)
    assert compute_of(model) == LAST


def test_the_note_is_copied_with_a_model_and_personal_models_are_without_it() -> None:
    plain = settled(ConvNet(2), dtype=torch.float32)
    model = with_compute(plain, BFLOAT16)
    assert compute_of(plain) == Compute()
    assert compute_of(copy.deepcopy(model)) == BFLOAT16
    assert compute_of(with_compute(model, Compute())) == Compute()
    assert list(model.state_dict()) == list(plain.state_dict())
    hyper = Hyperparams.constant(FunctionalModel(model).sites, mix=0.5, rate=0.01)
    x, y = examples(8, 2, 6, 6, dtype=torch.float32)
    assert vars(finetune(model, hyper, (x, y), epochs=1)).keys() == vars(plain).keys()


def test_a_study_says_how_its_nodes_compute() -> None:
    study = Study(
        data=Digits(seen=2, unseen=1), compute=Compute(precision="bfloat16", channels_last=True)
    )
    assert compute_of(node_of(study).model) == study.compute
    assert compute_of(working_copies(node_of(study).model).net.plain) == study.compute


def test_a_stack_in_bfloat16_is_refused() -> None:
    net = FunctionalModel(net_of(BFLOAT16))
    x = torch.zeros(2, 3, 2, 6, 6)
    with pytest.raises(ValueError, match="2 clients came stacked, but in bfloat16"):
        net.logits(net.start(2, "global"), torch.zeros(2, 2), x, training=False)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is 'half', but must be one of full, bfloat16"):
        Compute(precision="half")
