"""The same numbers on a GPU as on a CPU, on every net of the folder; skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedl2p import (
    ClientData,
    Examples,
    Hyperparams,
    InnerLoop,
    MetaNets,
    Rounds,
    Settings,
    find_sites,
    finetune,
    hypergradient,
    learn,
    personalize,
)
from fedl2p.core.settings import MODES
from foreign.nets import CASES
from foreign.nets.case import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU = "cuda"
SIZE = 4
SETTINGS = Settings(finetune=InnerLoop(epochs=1, batch_size=SIZE), finetune_rate=0.05)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def close(case: Case, ours: Tensor, wanted: Tensor, name: str) -> None:
    assert ours.dtype == wanted.dtype, name
    near = max(1e-6, 10 * case.tolerance)
    torch.testing.assert_close(
        ours.cpu(), wanted.cpu(), rtol=near, atol=near, msg=lambda m: f"{name}: {m}"
    )


def tuned(case: Case, model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
    return finetune(model, hyper, data, epochs=2, batch_size=SIZE, seed=3).state_dict()


def test_finetuning_equals_that_on_the_cpu(case: Case) -> None:
    """Wherever the data are."""
    x, y = case.examples(10, 1)
    model = case.build().to(GPU)
    state = torch.cuda.get_rng_state()
    ours = tuned(case, model, (x.to(GPU), y.to(GPU)))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(v.device.type == GPU for v in ours.values())
    again = tuned(case, model, (x, y))
    for name, value in ours.items():
        close(case, again[name], value, name)
    if not case.random:  # a GPU draws other numbers from the same seed
        wanted = tuned(case, case.build(), (x, y))
        for name, value in ours.items():
            close(case, value, wanted[name], name)


def test_a_model_in_dataparallel_trains_as_the_model_itself() -> None:
    case = CASES["residual"]
    data = case.examples(10, 1)
    wanted = tuned(case, case.build().to(GPU), data)
    ours = tuned(case, nn.DataParallel(case.build().to(GPU)), data)
    assert ours.keys() == {f"module.{name}" for name in wanted}
    for name, value in wanted.items():
        close(case, ours[f"module.{name}"], value, name)


@pytest.mark.parametrize("mode", MODES)
def test_hypergradients_equal_those_on_the_cpu(case: Case, mode: str) -> None:
    if case.random or not case.differentiable:
        pytest.skip("draws other numbers, or is not a differentiable function")
    batches, last = [case.examples(5, 10 + k) for k in range(3)], case.examples(6, 20)
    answers = []
    for device in ("cpu", GPU):
        model = case.build().to(device)
        hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
        drawn = [(x.to(device), y.to(device)) for x, y in [*batches, last]]
        answers.append(hypergradient(model, hyper, drawn[:-1], drawn[-1], mode=mode))
    for kind in ("mix", "rate"):
        for name, value in answers[0][kind].items():
            assert float(answers[1][kind][name]) == pytest.approx(
                float(value), rel=1e-4, abs=1e-6
            ), (kind, name)


def learned(case: Case, device: str) -> MetaNets:
    data = {
        f"c{i}": ClientData(
            *(Examples(*case.examples(n, 100 * i + j)) for j, n in enumerate((9, 5, 4)))
        )
        for i in range(4)
    }
    model = case.build().to(device)
    rounds = Rounds(rounds=2, keep="last")
    return learn(model, data, rounds=rounds, settings=SETTINGS, seed=1, progress=False)


def test_learning_and_personalizing_equal_those_on_the_cpu(case: Case) -> None:
    nets = learned(case, GPU)
    x, y = case.examples(10, 1)
    ours = personalize(case.build().to(GPU), nets, (x, y), epochs=1, batch_size=SIZE)
    assert {v.device.type for v in ours.model.state_dict().values()} == {GPU}
    if case.random or not case.differentiable:
        return
    wanted_nets = learned(case, "cpu")
    for name, value in nets.state_dict().items():
        torch.testing.assert_close(
            value.cpu(), wanted_nets.state_dict()[name].cpu(), rtol=1e-3, atol=1e-4, msg=name
        )
    wanted = personalize(case.build(), nets, (x, y), epochs=1, batch_size=SIZE)
    for name, value in ours.model.state_dict().items():
        close(case, value, wanted.model.state_dict()[name], name)
