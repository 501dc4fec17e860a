"""What the further baselines share: their state, settings, and a study of them all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from fedl2p import recipes
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.in_place_sgd import sgd
from fedl2p.core.functional.model import ModelState
from fedl2p.core.settings import InnerLoop
from fedl2p.data.digits import Digits
from fedl2p.methods import build
from fedl2p.methods.base.settings import Baselines
from fedl2p.study.run import run_study
from fedl2p.study.settings import METHODS
from support.baseline_tools import NAMES, SETTINGS, after_a_round, make_client, method
from support.nets import nested_net


def test_a_tensor_with_rate_zero_for_all_stays_the_very_same_and_asks_for_no_gradient() -> None:
    start = ModelState({"a": torch.ones(2, 3), "b": torch.ones(2)}, {})
    asked: list[set[str]] = []

    def gradient(state: ModelState, step: int, wanted: frozenset[str]) -> tuple[dict, dict]:
        asked.append(set(wanted))
        return {k: torch.full_like(state.params[k], 2.0) for k in wanted}, {}

    after = sgd(start, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), gradient, range(2))
    assert asked == [{"a"}, {"a"}]
    assert after.params["b"].data_ptr() == start.params["b"].data_ptr()
    assert after.params["a"].tolist() == [[-1.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("name", NAMES)
def test_what_clients_keep_is_a_copy_and_the_same_alone(name: str) -> None:
    model = nested_net()
    chosen = method(name)
    state, clients = after_a_round(chosen, model)
    together = chosen.train(model, state, clients)
    for client, update in zip(clients, together, strict=True):
        (alone,) = chosen.train(model, state, [client])
        assert alone.kept.keys() == update.kept.keys()
        for k, tensor in update.kept.items():
            torch.testing.assert_close(alone.kept[k], tensor, rtol=1e-5, atol=1e-6)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not a view of its stack


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("fedprox", "fedbn")] + ["finetuning-head"]
)
def test_personalization_uses_the_rate_of_the_baselines(name: str) -> None:
    given = dataclasses.replace(SETTINGS, baselines=Baselines(rate=0.125))
    assert build(name, given).rate == 0.125  # type: ignore[attr-defined]
    assert build(name, SETTINGS).rate == SETTINGS.local.rate  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("fedbn", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "has none"),
        ("finetuning-norms", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "has none"),
        ("fedper", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "nothing but its head"),
        ("fedrep", nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "no linear layer"),
        ("fedbabu", nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "no linear layer"),
        ("finetuning-head", nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "no linear layer"),
    ],
)
def test_a_model_without_the_part_is_refused(name: str, model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        build(name, SETTINGS).start(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.0},
        {"fedprox_mu": -1.0},
        {"ditto_lambda": float("inf")},
        {"perfedavg_delta": 0.0},
        {"fedrep_head_epochs": 0},
        {"apfl_alpha": 1.5},
    ],
)
def test_settings_are_checked(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Baselines(**changes)  # type: ignore[arg-type]


def test_a_study_refuses_a_model_without_the_part_before_it_writes(tmp_path: Path) -> None:
    study = dataclasses.replace(
        recipes.get("smoke"),
        model="support.baseline_tools:without_norms",
        methods=("fedavg", "fedbn"),
    )
    with pytest.raises(ValueError, match=r"fedbn .*has none; leave fedbn out"):
        run_study(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_study_runs_them_all_and_none_unasked() -> None:
    assert not {*NAMES, "finetuning-head", "finetuning-norms"} & set(METHODS)
    smoke = recipes.get("smoke")
    few = Digits(seen=3, unseen=2, train=24, validation=8, test=16)
    study = dataclasses.replace(
        smoke,
        data=few,
        methods=(*NAMES, "finetuning-head", "finetuning-norms"),
        pretrain=dataclasses.replace(smoke.pretrain, rounds=2, clients_per_round=2),
        learn=dataclasses.replace(smoke.learn, clients_per_round=2),
        settings=dataclasses.replace(smoke.settings, finetune=InnerLoop(epochs=1)),
    )
    report = run_study(study)
    assert {(s.method, s.pool) for s in report.methods} == {
        (name, pool) for name in study.methods for pool in ("seen", "unseen")
    }
    assert not [row for row in report.rows if row.failure is not None]


@pytest.mark.parametrize("name", ["finetuning-client", "finetuning-global"])
def test_finite_weights_that_give_no_finite_loss_are_a_failure(name: str) -> None:
    """One step at a rate of 1e25: every weight is finite, their product is not."""
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    inner = InnerLoop(epochs=1, batch_size=64)
    client = make_client(0)
    train, test = (Examples(p.x.float(), p.y) for p in (client.data.train, client.data.test) if p)
    chosen = build(name, dataclasses.replace(SETTINGS, finetune=inner, finetune_rate=1e25))
    (outcome,) = chosen.personalize(
        deep, {}, [dataclasses.replace(client, data=ClientData(train, test=test))]
    )
    assert outcome.failure is not None
    assert "the loss on the test part is" in outcome.failure
    assert outcome.model is None
