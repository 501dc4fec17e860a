"""The main job in miniature: its files and fields, the same result twice, and after a break."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedl2p import MetaNets, find_sites, methods, models, recipes
from fedl2p.core.settings import Compute
from fedl2p.federation.listeners import Listener
from fedl2p.federation.round_records import RoundRecord
from fedl2p.federation.sampling import draw_cohort
from fedl2p.runs.results import Report
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.run import run_study
from fedl2p.study.settings import METHODS, Study

FILES = {
    *("config.json", "population.json", "results.json", "clients.csv", "rounds.csv"),
    *("global.safetensors", "metanets.safetensors", "metanets.json", "checkpoint", "clients"),
    "log.txt",
}
ROUND_COLUMNS = [
    *("stage", "round", "clients", "loss", "accuracy", "seconds", "bytes_down", "bytes_up"),
    "failures",
]
CLIENT_COLUMNS = [
    *("method", "client", "pool", "num_train", "num_test", "accuracy_before", "accuracy"),
    *("loss_before", "loss", "seconds"),
]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not k.startswith("seconds")}
    if isinstance(value, list):
        return [without_seconds(v) for v in value]
    return value


def results(folder: Path) -> Any:
    return without_seconds(json.loads((folder / "results.json").read_text()))


def clients(folder: Path) -> list[dict[str, str]]:
    return [without_seconds(row) for row in read_csv(folder / "clients.csv")]


def rounds(folder: Path) -> list[dict[str, str]]:
    return [without_seconds(row) for row in read_csv(folder / "rounds.csv")]


def test_files_and_fields(smoke_run: Path) -> None:
    assert {path.name for path in smoke_run.iterdir()} >= FILES
    told = json.loads((smoke_run / "results.json").read_text())
    assert (told["recipe"], told["seed"], told["engine"], told["device"]) == (
        *("smoke", 0, "in-process"),
        told["device"],
    )
    assert set(told["seconds"]) == {"pretrain", "learn", "personalize", "total"}
    for stage in ("pretrain", "learn"):
        assert told["bytes_per_client_round"][stage]["down"] > 0
        assert told["bytes_per_client_round"][stage]["up"] > 0
    assert {"fedl2p", "torch", "flwr", "python"} <= set(told["versions"])
    assert [(m["method"], m["pool"]) for m in told["methods"]] == [
        (name, pool) for name in METHODS for pool in ("seen", "unseen")
    ]
    for line in told["methods"]:
        assert set(line) == {
            *("method", "pool", "clients", "accuracy_before", "accuracy"),
            *("accuracy_worst_decile", "share_worse", "loss", "seconds_per_client"),
        }
        assert 0 <= line["accuracy_worst_decile"] <= line["accuracy"] <= 1
        assert 0 <= line["share_worse"] <= 1
    (start,) = (m for m in told["methods"] if (m["method"], m["pool"]) == ("fedavg", "unseen"))
    assert start["share_worse"] == 0


def test_tables(smoke_run: Path) -> None:
    study = recipes.get("smoke")
    population = study.data.open(0)
    lines = read_csv(smoke_run / "clients.csv")
    assert list(lines[0]) == CLIENT_COLUMNS
    assert [(line["method"], line["client"]) for line in lines] == [
        (method, client) for method in METHODS for client in population.names
    ]
    lines = read_csv(smoke_run / "rounds.csv")
    assert list(lines[0]) == ROUND_COLUMNS
    trained = {name for name in METHODS if methods.build(name, study.settings).rounds != "none"}
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages[0] == "pretrain"
    assert set(stages[1:]) == {"learn" if s == "fedl2p" else s for s in trained - {"fedavg"}}
    for stage, wanted in (("pretrain", study.pretrain.rounds), ("learn", study.learn.rounds)):
        # One more than the rounds: the pass that judges the last state.
        numbers = [int(line["round"]) for line in lines if line["stage"] == stage]
        assert numbers == list(range(1, wanted + 2))


def test_every_method_starts_from_the_model_that_it_says(smoke_run: Path) -> None:
    report = Report.load(smoke_run)
    settings = recipes.get("smoke").settings
    before: dict[str, dict[str, float]] = {}
    for row in report.rows:
        before.setdefault(row.method, {})[row.client] = row.loss_before
    for name in METHODS:
        scratch = methods.build(name, settings).starts_from == "scratch"
        if not scratch:
            assert before[name] == pytest.approx(before["fedl2p"], abs=1e-6)
    # The pre-trained model is not the initial one.
    assert before["local"] != pytest.approx(before["fedl2p"], abs=1e-3)
    # FedAvg's own result is what the others start from.
    after = {row.client: row.loss for row in report.rows if row.method == "fedavg"}
    assert after == pytest.approx(before["fedl2p"], abs=1e-5)


def test_the_saved_model_and_meta_nets_load(smoke_run: Path) -> None:
    study = Study.load(smoke_run)
    model = models.load(study.model, shape=(1, 8, 8), classes=10)
    model.load_state_dict(load_tensors(smoke_run / "global.safetensors"))
    nets = MetaNets.load(smoke_run)
    assert nets.sites == find_sites(model)
    assert (nets.card.clients, nets.card.profiled) == (6, 5)  # one took part in no round
    assert set(nets.card.low) == set(nets.entry_names)
    assert nets.card.data_licence == "CC BY 4.0"
    assert "`SmallConv" in (smoke_run / "README.md").read_text()
    described = json.loads((smoke_run / "population.json").read_text())
    assert described["classes"] == 10
    assert described["shape"] == [1, 8, 8]
    assert {c["pool"] for c in described["clients"].values()} == {"seen", "unseen"}
    one = next((smoke_run / "clients" / "fedl2p").glob("*.json"))
    said = json.loads(one.read_text())
    assert set(said["mix"]) == set(nets.sites.norms)
    assert set(said["rate"]) == set(nets.sites.params)
    assert said["divergence"] is not None


def test_config_is_the_resolved_study(smoke_run: Path) -> None:
    assert Study.load(smoke_run) == recipes.get("smoke")


def test_the_log_names_the_stages(smoke_run: Path) -> None:
    log = (smoke_run / "log.txt").read_text()
    assert "smoke, seed 0" in log
    assert "fedl2p: 10 of 10 clients personalized" in log
    assert logging.getLogger("fedl2p").handlers == []  # the log file's has gone again


@pytest.mark.slow
def test_the_same_seed_gives_the_same_result(smoke_run: Path, tmp_path: Path) -> None:
    run_study(recipes.get("smoke"), tmp_path)
    assert results(tmp_path) == results(smoke_run)
    assert clients(tmp_path) == clients(smoke_run)
    assert rounds(tmp_path) == rounds(smoke_run)


def small(**changes: Any) -> Study:
    """The smallest study that has every kind of stage."""
    study = dataclasses.replace(
        recipes.get("smoke"), methods=("finetuning-client", "bestfixed", "fedl2p")
    )
    return dataclasses.replace(study, **changes)


@pytest.mark.slow
def test_another_seed_gives_another_result() -> None:
    one = run_study(small(methods=("fedavg",)))
    two = run_study(small(methods=("fedavg",), seed=1))
    assert [r.loss for r in one.rows] != [r.loss for r in two.rows]


@pytest.mark.slow
def test_stack_size_changes_nothing_but_rounding() -> None:
    # Few rounds, since training amplifies the rounding; and a smooth model: where a background
    # sits on the kink of a ReLU, the last bit decides over a step.
    study = small()
    short = {
        "model": "fedl2p.models:small_resnet",
        "pretrain": dataclasses.replace(study.pretrain, rounds=2),
        "learn": dataclasses.replace(study.learn, rounds=1),
    }
    alone = Compute(stack_size=1)
    one, two = run_study(small(**short)), run_study(small(**short, compute=alone))
    assert [r.loss for r in one.rows] == pytest.approx([r.loss for r in two.rows], rel=1e-4)


def test_nothing_global_is_drawn_or_seeded() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run_study(small(methods=("finetuning-client",)))
    assert torch.equal(torch.get_rng_state(), before)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


class StopAt(Listener):
    """A listener that interrupts the run at one moment."""

    def __init__(self, stage: str, round: int) -> None:
        self.moment = (stage, round)

    def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
        if (stage, 0) == self.moment:
            raise Interrupted

    def on_round(self, record: RoundRecord) -> None:
        if (record.stage, record.round) == self.moment:
            raise Interrupted

    def on_end(self, stage: str) -> None:
        pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run_study(small(), out)
    return out


@pytest.mark.parametrize(
    ("stage", "round"),
    [
        ("learn", 1),
        *(
            pytest.param(*moment, marks=pytest.mark.slow)
            for moment in (
                ("pretrain", 2),
                ("learn", 2),
                ("bestfixed", 0),
                ("bestfixed", 1),
                ("personalize fedl2p", 0),
                ("personalize bestfixed", 0),
            )
        ),
    ],
)
def test_resuming_equals_an_uninterrupted_run(
    stage: str, round: int, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_study(small(), out, listeners=[StopAt(stage, round)])
    assert not (out / "results.json").exists()
    with pytest.raises(ValueError, match="already holds a run"):
        run_study(small(), out)
    with pytest.raises(ValueError, match=r"holds a run of other settings.*seed is 0 and 3"):
        run_study(small(seed=3), out, resume=True)
    run_study(small(), out, resume=True)
    assert results(out) == results(uninterrupted)
    assert clients(out) == clients(uninterrupted)
    assert rounds(out) == rounds(uninterrupted)


@pytest.mark.slow
def test_the_model_travels_once_and_is_not_part_of_what_a_round_costs(tmp_path: Path) -> None:
    """Whoever brings it: the personalization of a baseline, or the learning rounds themselves."""
    told, learned = [], []
    for name, methods_run in (("first", ("fedl2p",)), ("later", ("finetuning-client", "fedl2p"))):
        run_study(small(methods=methods_run), tmp_path / name)
        told.append(json.loads((tmp_path / name / "results.json").read_text()))
        lines = [line for line in rounds(tmp_path / name) if line["stage"] == "learn"]
        learned.append(lines[: small().learn.rounds])
    first, later = told
    assert first["bytes_per_client_round"] == later["bytes_per_client_round"]
    assert first["bytes_model"] == later["bytes_model"] > 0
    # Meta-nets come and go, with their loss and a few words about the job besides.
    ways = first["bytes_per_client_round"]["learn"]
    assert ways["up"] <= ways["down"] < ways["up"] + 200
    # All that travels is in rounds.csv: here the rounds bring the model, to each client once.
    journeys = len({c for r in range(1, 4) for c in drawn(r)})
    down = [sum(int(line["bytes_down"]) for line in lines) for lines in learned]
    assert down[0] - down[1] == journeys * first["bytes_model"]


def drawn(round: int) -> list[str]:
    """The seen clients of a round of learning."""
    study = small()
    seen = study.data.open(0).seen
    return draw_cohort(seen, size=study.learn.clients_per_round, seed=0, round=round)


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path) -> None:
    before = {f.name: f.read_bytes() for f in uninterrupted.glob("*.*") if f.name != "log.txt"}
    run_study(small(), uninterrupted, resume=True)
    after = {f.name: f.read_bytes() for f in uninterrupted.glob("*.*") if f.name != "log.txt"}
    assert after == before


@pytest.mark.slow
def test_a_given_global_model_is_not_trained(uninterrupted: Path, tmp_path: Path) -> None:
    given = small(pretrained=uninterrupted / "global.safetensors")
    report = run_study(given, tmp_path)
    assert "pretrain" not in {row["stage"] for row in rounds(tmp_path)}
    assert report.seconds["pretrain"] == 0
    whole = Report.load(uninterrupted)
    assert [r.loss for r in report.rows] == pytest.approx([r.loss for r in whole.rows], rel=1e-5)
    assert Study.load(tmp_path) == given


def test_weights_of_another_model_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    other = small(
        pretrained=uninterrupted / "global.safetensors", model="fedl2p.models:small_resnet"
    )
    with pytest.raises(ValueError, match="do not fit the model"):
        run_study(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_clients_per_round_than_there_are(tmp_path: Path) -> None:
    study = small()
    study = small(learn=dataclasses.replace(study.learn, clients_per_round=7))
    with pytest.raises(ValueError, match="only 6 seen clients"):
        run_study(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()
