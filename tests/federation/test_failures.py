"""Failures are never silent: a stage without a result is an error that names client and reason."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from fedl2p import (
    ClientData,
    Examples,
    FederationError,
    InnerLoop,
    Rounds,
    Settings,
    learn,
    methods,
)
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.listeners import FailuresListener
from fedl2p.federation.personalizing import personalize_all

FAST = Settings(finetune=InnerLoop(epochs=1))


def examples(n: int, *, seed: int = 0, scale: float = 1.0) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(n, 5, generator=draw) * scale, torch.arange(n) % 3)


def clients(count: int = 4) -> dict[str, ClientData]:
    return {
        f"c{i}": ClientData(examples(20, seed=i), examples(10, seed=i + 9), examples(10, seed=i))
        for i in range(count)
    }


class Broken(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such sensor")


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_model_that_always_fails_is_an_error_at_once(rounds: int) -> None:
    with pytest.raises((FederationError, ValueError, RuntimeError), match="no such sensor"):
        learn(Broken(5, 3), clients(), rounds=Rounds(rounds=rounds), settings=FAST)


def test_clients_that_all_diverge_are_an_error_though_fewer_rounds_than_give_up() -> None:
    data = {name: ClientData(examples(20, scale=float("nan")), examples(10)) for name in ("a", "b")}
    with pytest.raises((FederationError, ValueError), match="'a'"):
        learn(nn.Linear(5, 3), data, rounds=Rounds(rounds=1), settings=FAST)


def test_one_failing_client_is_a_warning_and_the_others_learn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = clients()
    data["c1"] = ClientData(examples(20, scale=float("nan")), examples(10))
    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        learn(nn.Linear(5, 3), data, rounds=Rounds(rounds=1), settings=FAST)
    assert any("c1" in record.getMessage() for record in caplog.records)


def test_warnings_of_the_package_are_not_swallowed_by_a_handler_of_its_own() -> None:
    assert not any(
        isinstance(handler, logging.NullHandler) for handler in logging.getLogger("fedl2p").handlers
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learning_enables_gradients_itself(mode: type) -> None:
    rounds = Rounds(rounds=2, strategy="fedadam", server_rate=0.01, keep="last")
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    wanted = learn(model, clients(), rounds=rounds, settings=FAST).state_dict()
    with mode():
        got = learn(model, clients(), rounds=rounds, settings=FAST).state_dict()
        assert not torch.is_grad_enabled()
    start = learn(model, clients(), rounds=Rounds(rounds=0), settings=FAST).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(start[name], wanted[name]) for name in wanted)


def test_failed_personalizations_stand_in_failures_csv_and_all_failing_is_an_error(
    tmp_path: Path,
) -> None:
    method = methods.build("finetuning-global", FAST)
    data = clients()
    data["c1"] = ClientData(examples(20, scale=float("nan")), examples(10), examples(10))
    model, listener = nn.Linear(5, 3), FailuresListener(tmp_path / "failures.csv")
    state = method.start(model)
    outcomes = personalize_all(method, model, state, InMemory(data), seed=0, listeners=[listener])
    assert [o.client for o in outcomes if o.failure] == ["c1"]
    with (tmp_path / "failures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["stage"], r["client"]) for r in rows] == [("personalize finetuning-global", "c1")]
    with pytest.raises(FederationError, match="every client failed"):
        personalize_all(method, model, state, InMemory({"c1": data["c1"]}), seed=0)
