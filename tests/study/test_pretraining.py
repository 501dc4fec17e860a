"""A data set may bring other data on which the global model is pre-trained."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from fedl2p import methods, models, recipes
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.results import Report
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study

pytest.importorskip("sklearn")


def small(**changes: object) -> Study:
    study = dataclasses.replace(recipes.get("digits_smoke"), methods=("fedavg", "fedl2p"))
    return dataclasses.replace(study, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretraining") / "run"
    run_study(small(), out)
    return out


def test_the_global_model_is_that_of_the_other_data(run: Path) -> None:
    study = small()
    population = study.data.open(0)
    other = population.pretraining()
    assert other is not None
    initial = models.build(study.model, shape=population.shape, classes=10, seed=0)
    expected = federate(
        methods.build("fedavg", study.settings),
        initial,
        other,
        rounds=study.pretrain,
        seed=0,
        stage="pretrain",
    )
    found = load_tensors(run / "global.safetensors")
    for name, tensor in expected.state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    own = federate(
        methods.build("fedavg", study.settings),
        initial,
        population,
        rounds=study.pretrain,
        seed=0,
        stage="pretrain",
    )
    assert not torch.allclose(found["conv1.weight"], own.state["conv1.weight"], atol=1e-3)


def test_its_clients_take_no_other_part(run: Path) -> None:
    with (run / "rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clients = {stage: {row["clients"] for row in rows if row["stage"] == stage} for stage in
               ("pretrain", "learn")}  # fmt: skip
    assert clients == {"pretrain": {"1"}, "learn": {"6"}}
    names = small().data.open(0).names
    assert tuple(PopulationInfo.read(run).clients) == names
    report = Report.load(run)
    assert not report.failures
    assert {row.client for row in report.rows} == set(names)


def test_a_stopped_pre_training_goes_on(run: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Listener:
        def on_start(self, *_: object) -> None: ...
        def on_end(self, *_: object) -> None: ...
        def on_round(self, record: object) -> None:
            raise Stop

    with pytest.raises(Stop):
        run_study(small(), tmp_path, listeners=(Listener(),))  # type: ignore[arg-type]
    run_study(small(), tmp_path, resume=True)
    one, other = (load_tensors(at / "global.safetensors") for at in (run, tmp_path))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_ray_gives_the_same_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run_study(small(engine="ray"), tmp_path)
    one, other = (load_tensors(at / "global.safetensors") for at in (run, tmp_path))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    rows = [[(r.client, r.loss) for r in Report.load(at).rows] for at in (run, tmp_path)]
    assert rows[0] == rows[1]


def test_rounds_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    private = Rounds(rounds=2, keep="last", privacy=Privacy(mechanism="central", noise=1, clip=1))
    for rounds, said in (
        (Rounds(rounds=2, clients_per_round=2), "clients_per_round is 2, but there are only 1"),
        (private, "pretrain.privacy protects clients"),
    ):
        with pytest.raises(ValueError, match=said):
            run_study(small(pretrain=rounds), tmp_path / "run")
    assert not (tmp_path / "run").exists()
