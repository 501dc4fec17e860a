"""The files of a run's folder, byte for byte: other tools read them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fedl2p.core.clientdata import ClientData
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import PROFILE_GROUPS, PUBLISHED_PROFILE
from fedl2p.core.sites import Sites
from fedl2p.data.population import Population
from fedl2p.federation.listeners import CsvListener, FailuresListener
from fedl2p.federation.round_records import RoundRecord
from fedl2p.method import Outcome
from fedl2p.runs.client_files import ClientHyperparams, write_hyperparams, write_personal_files
from fedl2p.runs.outcomes import PersonalizedClients
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.privacy_spent import MethodSpent, PrivacySpent, StageSpent
from fedl2p.runs.results import Report, Row

SITES = Sites(
    norms=("norm",),
    layers=("conv", "head"),
    params=("conv.weight", "head.bias"),
    head=("head.bias",),
)

ROWS = (
    Row(
        method="fedl2p",
        client="a,b",
        pool="seen",
        num_train=5,
        num_test=10,
        accuracy_before=0.25,
        accuracy=0.5,
        loss_before=2.0,
        loss=math.inf,
        seconds=0.125,
    ),
    Row(
        method="fedl2p",
        client="c",
        pool="unseen",
        num_train=4,
        num_test=0,
        accuracy_before=math.nan,
        accuracy=math.nan,
        loss_before=math.nan,
        loss=math.nan,
        seconds=1.0,
    ),
    Row(
        method="fedl2p",
        client="d",
        pool="unseen",
        num_train=3,
        num_test=2,
        accuracy_before=math.nan,
        accuracy=math.nan,
        loss_before=math.nan,
        loss=math.nan,
        seconds=math.nan,
        failure="its loss is not finite",
    ),
)

REPORT = Report(
    recipe="digits",
    seed=3,
    engine="in-process",
    device="cpu",
    versions={"fedl2p": "0.1.0"},
    seconds={"pretrain": 1.5, "total": 1.5},
    bytes_per_client_round={"learn": {"down": 20.0, "up": 10.5}},
    bytes_model=400,
    privacy=PrivacySpent(
        (
            StageSpent(
                stage="learn",
                mechanism="central",
                randomness="seed",
                noise=1.0,
                clip=0.1,
                cohort=2,
                population=4,
                releases=3,
                epsilon=2.5,
                delta=1e-5,
            ),
        ),
        (MethodSpent(method="fedl2p", epsilon=math.inf, delta=1e-5, open=("pretrain",)),),
    ),
    rows=ROWS,
)

CLIENTS = """\
method,client,pool,num_train,num_test,accuracy_before,accuracy,loss_before,loss,seconds
fedl2p,"a,b",seen,5,10,0.25,0.5,2.0,inf,0.125
fedl2p,c,unseen,4,0,nan,nan,nan,nan,1.0
"""

RESULTS = """\
{
  "recipe": "digits",
  "seed": 3,
  "engine": "in-process",
  "device": "cpu",
  "versions": {
    "fedl2p": "0.1.0"
  },
  "seconds": {
    "pretrain": 1.5,
    "total": 1.5
  },
  "bytes_per_client_round": {
    "learn": {
      "down": 20.0,
      "up": 10.5
    }
  },
  "bytes_model": 400,
  "privacy": {
    "stages": [
      {
        "stage": "learn",
        "mechanism": "central",
        "randomness": "seed",
        "noise": 1.0,
        "clip": 0.1,
        "cohort": 2,
        "population": 4,
        "releases": 3,
        "epsilon": 2.5,
        "delta": 1e-05
      }
    ],
    "methods": [
      {
        "method": "fedl2p",
        "epsilon": null,
        "delta": 1e-05,
        "open": [
          "pretrain"
        ]
      }
    ]
  },
  "methods": [
    {
      "method": "fedl2p",
      "pool": "seen",
      "clients": 1,
      "accuracy_before": 0.25,
      "accuracy": 0.5,
      "accuracy_worst_decile": 0.5,
      "share_worse": 0.0,
      "loss": null,
      "seconds_per_client": 0.125
    },
    {
      "method": "fedl2p",
      "pool": "unseen",
      "clients": 1,
      "accuracy_before": null,
      "accuracy": null,
      "accuracy_worst_decile": null,
      "share_worse": null,
      "loss": null,
      "seconds_per_client": 1.0
    }
  ],
  "kinds": [],
  "failures": [
    {
      "method": "fedl2p",
      "client": "d",
      "pool": "unseen",
      "num_train": 3,
      "num_test": 2,
      "reason": "its loss is not finite"
    }
  ]
}
"""


def test_results_json_and_clients_csv(tmp_path: Path) -> None:
    REPORT.save(tmp_path)
    assert (tmp_path / "clients.csv").read_bytes().decode() == CLIENTS
    assert (tmp_path / "results.json").read_bytes().decode() == RESULTS
    assert repr(Report.load(tmp_path)) == repr(REPORT)  # NaN is not equal to itself


def test_rounds_csv_and_failures_csv(tmp_path: Path) -> None:
    record = RoundRecord("learn", 2, 4, 0.5, math.nan, 1.5, 100, 50, 1, 30, {"a,b": "no luck"})
    for name, listener in (("rounds", CsvListener), ("failures", FailuresListener)):
        writer = listener(tmp_path / f"{name}.csv")
        writer.on_start("learn", 2, ())
        writer.on_round(record)
    assert (tmp_path / "rounds.csv").read_bytes().decode() == (
        "stage,round,clients,loss,accuracy,seconds,bytes_down,bytes_up,failures\n"
        "learn,2,4,0.5,nan,1.5,100,50,1\n"
    )
    assert (tmp_path / "failures.csv").read_bytes().decode() == (
        'stage,round,client,reason\nlearn,2,"a,b",no luck\n'
    )


class Two(Population):
    seen, unseen = ("a",), ("é",)
    classes, shape = 10, (1, 8, 8)

    def open(self, name: str) -> ClientData:
        raise KeyError(name)

    def about(self, name: str) -> Mapping[str, str | float]:
        return {"sensor": "blur", "severity": 0.5} if name == "a" else {}


def test_population_json(tmp_path: Path) -> None:
    info = PopulationInfo.of(Two())
    info.write(tmp_path)
    path = tmp_path / "population.json"
    assert json.loads(path.read_text("utf-8")) == {
        "classes": 10,
        "shape": [1, 8, 8],
        "clients": {
            "a": {"pool": "seen", "about": {"sensor": "blur", "severity": 0.5}},
            "é": {"pool": "unseen", "about": {}},
        },
    }
    assert PopulationInfo.read(tmp_path) == info


def outcome(profile: Profile | None) -> Outcome:
    return Outcome(
        client="a b/c",
        num_train=5,
        num_test=10,
        accuracy_before=0.25,
        accuracy=0.5,
        loss_before=2.0,
        loss=1.5,
        seconds=0.125,
        hyperparams=Hyperparams(torch.tensor([0.5]), torch.tensor([0.25, 0.125]), SITES),
        profile=profile,
    )


PROFILE = Profile(torch.tensor([0.75]), torch.tensor([[0.0, 1.0], [0.5, math.inf]]), 5, SITES)


@pytest.mark.parametrize("profile", [None, PROFILE])
def test_a_clients_hyperparameters_have_one_form(profile: Profile | None, tmp_path: Path) -> None:
    one = outcome(profile)
    assert one.hyperparams is not None
    write_hyperparams(tmp_path, "fedl2p", one)
    path = tmp_path / "clients" / "fedl2p" / "a b%2Fc.json"
    content = {
        "client": "a b/c",
        "method": "fedl2p",
        "mix": {"norm": 0.5},
        "rate": {"conv.weight": 0.25, "head.bias": 0.125},
        "divergence": {"norm": 0.75} if profile else None,
        "moments": {"conv": [0.0, 1.0], "head": [0.5, None]} if profile else None,
        "gradients": None,
        "loss": None,
        "labels": None,
        "size": None,
    }
    assert path.read_text() == json.dumps(content, indent=1) + "\n"
    hyperparams = ClientHyperparams.of(one.client, "fedl2p", one.hyperparams, profile)
    write_personal_files(tmp_path / "me", torch.nn.Linear(1, 1), hyperparams, one)
    assert (tmp_path / "me" / "hyperparams.json").read_bytes() == path.read_bytes()
    read = ClientHyperparams.read(path)
    assert read.rate == hyperparams.rate
    assert read.mix == hyperparams.mix
    assert read.divergence == hyperparams.divergence


def test_the_files_of_a_personalized_client(tmp_path: Path) -> None:
    write_personal_files(tmp_path, torch.nn.Linear(1, 1), None, outcome(None))
    assert (tmp_path / "outcome.json").read_text() == json.dumps(
        {
            "num_train": 5,
            "num_test": 10,
            "accuracy_before": 0.25,
            "accuracy": 0.5,
            "loss_before": 2.0,
            "loss": 1.5,
        },
        indent=1,
    ) + "\n"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "outcome.json"}
    write_personal_files(tmp_path, torch.nn.Linear(1, 1))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"}


WHOLE = Profile(torch.tensor([0.75]), torch.tensor([[0.0, 1.0], [0.5, 2.0]]), 5, SITES)
FULL = dataclasses.replace(
    WHOLE,
    gradients=torch.tensor([0.5, 0.0]),
    loss=torch.tensor([0.25, 0.75]),
    labels=torch.tensor([1.5, 3.0, 0.5]),
    size=torch.tensor([5.0]),
)


@pytest.mark.parametrize(
    ("profile", "groups"),
    [(WHOLE, PUBLISHED_PROFILE), (WHOLE, ()), (FULL, PROFILE_GROUPS), (FULL, ("loss",))],
)
def test_a_profile_comes_back(profile: Profile, groups: tuple[str, ...], tmp_path: Path) -> None:
    write_hyperparams(tmp_path, "fedl2p", outcome(profile))
    path = tmp_path / "clients" / "fedl2p" / "a b%2Fc.json"
    again = ClientHyperparams.read(path).profile(SITES, path, groups).tensors()
    assert again.keys() == {"divergence", "moments", *(GROUPS[g].field for g in groups)}
    for field, value in again.items():
        assert torch.equal(value, profile.tensors()[field].double())


@pytest.mark.parametrize(
    ("profile", "groups"),
    [
        *((WHOLE, PROFILE_GROUPS), (PROFILE, PUBLISHED_PROFILE), (None, PUBLISHED_PROFILE)),
        (dataclasses.replace(FULL, gradients=torch.tensor([0.5, math.nan])), PROFILE_GROUPS),
    ],
)
def test_a_profile_that_lacks_something_is_refused(
    profile: Profile | None, groups: tuple[str, ...], tmp_path: Path
) -> None:
    write_hyperparams(tmp_path, "fedl2p", outcome(profile))
    path = tmp_path / "clients" / "fedl2p" / "a b%2Fc.json"
    with pytest.raises(ValueError, match=r"c\.json is damaged: it lacks the profile"):
        ClientHyperparams.read(path).profile(SITES, path, groups)


def test_rows_of_a_stopped_run_come_back(tmp_path: Path) -> None:
    stored = PersonalizedClients(rows=ROWS, seconds=1.5)
    stored.write(tmp_path / "checkpoint" / "fedl2p.json")
    assert repr(PersonalizedClients.read(tmp_path / "checkpoint" / "fedl2p.json")) == repr(stored)
