"""What does not fit is said before training, with the client's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedl2p
from fedl2p import ClientData, Examples, Hyperparams, Rounds, find_sites
from fedl2p.core.data_check import check_client
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.objective import Objective, objective


def net(**how: Any) -> FunctionalModel:
    torch.manual_seed(0)
    return FunctionalModel(nn.Linear(5, 3), objective(**how))


X = torch.randn(6, 5)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

BAD: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "a label too high": (X, LABELS + 5, {}, "label 7, but the model's outputs have 3 classes"),
    "a negative label": (X, LABELS - 1, {}, "label -1; number .* or give ignore_index=-1"),
    "another negative label": (X, LABELS - 100, {"ignore_index": -99}, "there is the label -100"),
    "nothing counts": (X, LABELS * 0, {"ignore_index": 0}, "every label is ignore_index, 0"),
    "floating labels": (X, X, {}, "dtype float32, but cross-entropy takes integer class labels"),
    "labels per token": (X, X.long(), {}, r"outputs are of shape \(2, 3\), which does not fit"),
    "several targets": (X, {"a": LABELS}, {}, "cross-entropy takes one tensor"),
    "wide inputs": (torch.randn(6, 4), LABELS, {}, "cannot run on inputs of .*6, 4.*RuntimeError"),
    "named inputs": ({"x": X}, LABELS, {}, "cannot run on inputs of .*TypeError"),
    "targets beyond 1": (X, X[:, :3].abs() + 2, {"loss": "bce"}, r"bce takes targets in \[0, 1\]"),
    "a target less": (X, X[:, :2], {"loss": "mse"}, r"targets of shape \(2, 2\); bce and mse"),
    "infinite targets": (X, X[:, :3] / 0, {"loss": "mse"}, "targets that are not finite"),
    "a mean": (X, X[:, :3], {"loss": nn.MSELoss()}, r"loss returned a tensor of shape \(\)"),
    "a loss that fails": (X, X, {"loss": lambda o, y: o - y}, "loss or metric fails on outputs"),
    "an error as a metric": (X, LABELS, {"metric": lambda o, y: y * 7.0}, r"metric returned .*7"),
    "no outputs": (X, LABELS, {"outputs": lambda o: (o, o)}, "takes one tensor; pick one by"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_what_does_not_fit_is_refused_by_client_and_part(
    case: tuple[Any, Any, dict[str, Any], str], part: str
) -> None:
    x, y, how, message = case
    good = LABELS if how.get("loss") is None else X[:, :3].sigmoid()
    if "ignore_index" in how:
        good = LABELS.clone()
        good[0] = how["ignore_index"]
        if how["ignore_index"] == 0:
            good[1:] = 1
    parts = {"train": Examples(X, good), part: Examples(x, y)}
    if part != "train" and how.get("loss") is not None and not isinstance(how["loss"], str):
        parts["train"] = Examples(x, y)
    with pytest.raises(ValueError, match=message) as raised:
        check_client(net(**how), ClientData(**parts), "zoe")
    assert str(raised.value).startswith("client 'zoe', ")
    assert "\n" not in str(raised.value)


def test_what_fits_runs_the_model_once_for_each_kind() -> None:
    functional = net()
    calls = []
    functional.plain.register_forward_hook(lambda *_: calls.append(1))
    for seed in range(3):
        check_client(functional, ClientData((X, LABELS.roll(seed)), (X, LABELS)), "a")
    assert len(functional.classes) == 1


def test_ignored_labels_may_be_of_any_value() -> None:
    y = LABELS.clone()
    y[2:] = 77
    check_client(net(ignore_index=77), ClientData((X, y)), "a")


def clients(y: Tensor) -> dict[str, ClientData]:
    good = ClientData((X, LABELS), (X, LABELS))
    return {"a": good, "b": ClientData((X, LABELS), (X, y)), "c": good}


@pytest.mark.parametrize("bad", [LABELS + 5, LABELS - 1])
def test_learn_refuses_a_client_by_name_before_any_round(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="client 'b', validation: there is the label"):
        fedl2p.learn(nn.Linear(5, 3), clients(bad), rounds=Rounds(rounds=1))


def test_learn_says_what_came_for_a_client() -> None:
    with pytest.raises(ValueError, match="client 'a': train: a int came"):
        fedl2p.learn(nn.Linear(5, 3), {"a": 3}, rounds=Rounds(rounds=1))
    with pytest.raises(ValueError, match="client 'a' has no validation part"):
        fedl2p.learn(nn.Linear(5, 3), {"a": (X, LABELS)}, rounds=Rounds(rounds=1))
    with pytest.raises(ValueError, match="lazy and has no shape yet"):
        fedl2p.learn(nn.LazyLinear(3), clients(LABELS), rounds=Rounds(rounds=1))


def test_finetune_personalize_and_hypergradient_refuse_alike() -> None:
    model = nn.Linear(5, 3)
    h = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.1)
    bad = (X, LABELS + 5)
    message = "label 7, but the model's outputs have 3 classes"
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        fedl2p.finetune(model, h, bad)
    with pytest.raises(ValueError, match=f"^batch 1: .*{message}"):
        fedl2p.hypergradient(model, h, [(X, LABELS), bad], (X, LABELS))
    with pytest.raises(ValueError, match=f"^validation: .*{message}"):
        fedl2p.hypergradient(model, h, [(X, LABELS)], bad)
    metanets = fedl2p.MetaNets(find_sites(model))
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        fedl2p.personalize(model, metanets, bad)


@pytest.mark.parametrize("epochs", [1.5, float("inf"), True, "2", -1])
def test_epochs_are_whole_numbers(epochs: Any) -> None:
    model = nn.Linear(5, 3)
    h = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.1)
    with pytest.raises(ValueError, match=r"epochs is .*, but must be"):
        fedl2p.finetune(model, h, (X, LABELS), epochs=epochs)


def test_the_default_objective_is_cross_entropy() -> None:
    assert net().objective == Objective()
