"""The recipes of the paper's tables: the published numbers, and each whole job in miniature."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedl2p import models, recipes
from fedl2p.cli import entry as cli
from fedl2p.core.settings import HypergradientConfig, MetaNetsConfig
from fedl2p.data.audio.distortion import Distort
from fedl2p.data.pools.augmentation import CropAndFlip, FlipAndRotate
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.recipes.paper.tables import cells
from fedl2p.runs.results import Report
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study
from support import smoke_data

pytest.importorskip("PIL")
pytest.importorskip("soundfile")

PAPER = ("cifar10", "cifar10c", "office10", "domainnet", "speech")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoke_data.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(archives: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEDL2P_DATA", str(archives))
    monkeypatch.chdir(tmp_path)  # where cifar10c looks for runs
    return archives


# --- the published numbers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stem", "per_round", "rounds", "rate", "epochs", "patience"),
    [
        ("cifar10", "cifar", 100, 500, 1e-3, 15, 50),
        ("cifar10c", "cifar", 25, 500, 1e-3, 15, 100),
        ("office10", "imagenet", 4, 100, 1e-2, 15, 100),
        ("domainnet", "imagenet", 15, 100, 1e-2, 15, 50),
        ("speech", "speech", 25, 100, 1e-2, 5, 50),
    ],
)
def test_published_settings(
    name: str, stem: str, per_round: int, rounds: int, rate: float, epochs: int, patience: int
) -> None:
    study = recipes.get(f"{name}_published")
    assert study.model == f"fedl2p.models:resnet18_{stem}"
    assert (study.learn.rounds, study.learn.clients_per_round) == (rounds, per_round)
    assert (study.learn.patience, study.learn.keep) == (patience, "best")
    assert study.learn.strategy == "fedavg"
    given = study.settings
    assert (given.finetune.epochs, given.finetune.batch_size) == (epochs, 32)
    assert given.finetune.statistics == "published"
    assert given.finetune_rate == given.personal_rate == rate
    assert given.finetune.final == ("train+validation" if name == "cifar10" else "train")
    meta = given.meta
    assert meta.nets == MetaNetsConfig.published(base_rate=rate)
    assert (meta.nets.form, meta.nets.hidden) == ("published", 100)
    assert meta.hypergradient == HypergradientConfig(mode="published", psi=0.1, terms=3)
    assert (meta.rate, meta.base_rate) == (1e-3, 1e-4)
    assert (meta.clip, meta.clip_at) == ("value", 1.0)
    assert (meta.outer_steps, meta.outer_epochs, meta.validation_batch) == (0, 3, 32)


def test_published_clients() -> None:
    cifar, corrupted, office, domains, speech = (
        recipes.get(f"{name}_published").data for name in PAPER
    )
    plain: Any = dataclasses.asdict
    wanted = {"seen": 1000, "unseen": 0, "train": 40, "validation": 10, "test": 10}
    assert plain(cifar).items() >= wanted.items()
    kinds = "brightness frost jpeg_compression contrast snow motion_blur pixelate speckle_noise"
    assert set(plain(corrupted)["corruptions"]) == {*kinds.split(), "fog", "saturate"}
    assert plain(corrupted).items() >= {"seen": 25, "unseen": 0, "severity": 2}.items()
    assert plain(office)["unseen"] == ()
    assert plain(domains).items() >= {"seen": 25, "unseen": 0}.items()
    told = plain(speech)
    assert (told["seen"], told["unseen"], told["silence"]) == (250, 50, 0.1)
    assert (told["shift_ms"], told["noise_probability"], told["noise_volume"]) == (100, 0.8, 0.1)
    assert told["balanced"]
    assert told["features"] == {"bins": 128, "shift_ms": 10, "frames": 128}


@pytest.mark.parametrize("name", ["cifar10", "cifar10c", "domainnet", "fashion", "fashionc"])
def test_a_cell_per_published_alpha(name: str) -> None:
    data: list[Any] = [cell.study.data for cell in cells(name)]
    assert [d.alpha for d in data] == [1000, 1, 0.5, 0.1]


def test_published_pretraining() -> None:
    cifar, speech = (recipes.get(f"{name}_published") for name in ("cifar10", "speech"))
    assert (cifar.pretrain.rounds, cifar.pretrain.clients_per_round) == (500, 10)
    assert (speech.pretrain.rounds, speech.pretrain.clients_per_round) == (500, 25)
    for study in (cifar, speech):
        assert (study.settings.local.epochs, study.settings.local.batch_size) == (1, 32)
        assert study.pretrained is None
    rates = [cifar.settings.local.rate_in(r) for r in (1, 249, 250, 374, 375, 500)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert cifar.settings.local.reads == "train+validation"
    local = speech.settings.local
    assert (local.rate_in(1), local.rate_in(500), local.rate_in(501)) == (
        *(0.1, pytest.approx(0.01), pytest.approx(0.01)),
    )
    factors = {round(local.rate_in(r + 1) / local.rate_in(r), 9) for r in range(1, 500)}
    assert len(factors) == 1


def test_other_pretraining_is_given() -> None:
    for name in ("office10", "domainnet"):
        study = recipes.get(name)
        assert study.pretrained == Path("data/resnet18-imagenet/resnet18-f37072fd.pth")
    assert recipes.get("cifar10c").pretrained == Path("runs/cifar10-alpha-0.1/global.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [
        {"end_rate": 0.0, "end_round": 5},
        {"end_rate": 0.01, "end_round": 1},
        {"end_round": 5},
        {"end_rate": 0.01, "end_round": 5, "decay_rounds": (2,)},
        {"end_rate": math.inf, "end_round": 5},
    ],
)
def test_impossible_schedules_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"end_rate"):
        LocalTraining(**wrong)


# --- ours, and variants -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_ours_differs_in_how_it_learns_only(name: str) -> None:
    ours, theirs = recipes.get(name), recipes.get(f"{name}_published")
    assert (ours.recipe, theirs.recipe) == (name, f"{name}_published")
    same = ("data", "model", "pretrained", "pretrain", "methods", "seed")
    assert all(getattr(ours, field) == getattr(theirs, field) for field in same)
    assert ours.learn.rounds == theirs.learn.rounds
    assert ours.learn.clients_per_round == theirs.learn.clients_per_round
    usual = recipes.get("digits_sensors")
    assert ours.learn.strategy == usual.learn.strategy == "fedadam"
    assert ours.learn.server_schedule == usual.learn.server_schedule
    assert ours.settings.meta.hypergradient == usual.settings.meta.hypergradient
    assert ours.settings.finetune.statistics == "corrected"
    for field in ("local", "finetune_rate", "local_epochs", "baselines"):
        assert getattr(ours.settings, field) == getattr(theirs.settings, field)
    assert ours.settings.finetune.epochs == theirs.settings.finetune.epochs
    assert ours.settings.meta.nets.base_rate == theirs.settings.finetune_rate


@pytest.mark.parametrize("name", PAPER)
def test_variants_go_by_name(name: str) -> None:
    ends = ("", "_published", "_smoke", "_published_smoke")
    assert list(recipes.variants(name)) == [name + end for end in ends]
    for variant in recipes.variants(name):
        assert recipes.get(variant).recipe == variant


@pytest.mark.parametrize(
    "name", ["cifar10_smoke_published", "digits_published", "cifar10_", "paper", "tables"]
)
def test_no_other_variants(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown recipe '{name}'"):
        recipes.get(name)


def test_alpha_is_an_option(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "cifar10c_smoke", "--out", "x", "--data.alpha", "0.5"])
    assert stop.value.code == 2
    # The first thing that cannot be used is the model, which is still to be made.
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/cifar10-alpha-0.1/global.safetensors is missing" in line
    assert "`fedl2p run cifar10_smoke --data.alpha 0.1 --methods fedavg --out runs/" in line
    assert not Path("x").exists()


def test_a_missing_checkpoint_names_its_command(data: Path, tmp_path: Path) -> None:
    study = dataclasses.replace(recipes.get("office10_smoke"), pretrained=tmp_path / "no.pth")
    with pytest.raises(ValueError, match=r"no\.pth is missing.*fedl2p data get resnet18-imagenet"):
        run_study(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the whole jobs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "augment"),
    [
        ("cifar10", CropAndFlip(padding=4)),
        ("cifar10c", CropAndFlip(padding=4)),
        ("office10", FlipAndRotate(degrees=30)),
        ("domainnet", FlipAndRotate(degrees=30)),
    ],
)
def test_published_augmentation(name: str, augment: Any, data: Path) -> None:
    population = recipes.get(f"{name}_published_smoke").data.open(0)
    own: Any = population.open(population.seen[0]).augment
    black = tuple(-m / s for m, s in zip(*NORMALISATION[name], strict=True))
    assert own == dataclasses.replace(augment, black=pytest.approx(black))


def test_published_distortion(data: Path) -> None:
    population = recipes.get("speech_published_smoke").data.open(0)
    own = population.open(population.seen[0])
    assert isinstance(own.augment, Distort)
    assert own.balanced


CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION = {"cifar10": CIFAR, "cifar10c": CIFAR, "office10": IMAGENET, "domainnet": IMAGENET}


def checked(study: Study, out: Path) -> Report:
    """Run a study and check that every stage and client has come to a result."""
    report = run_study(study, out)
    population = study.data.open(study.seed)
    assert not report.failures
    ran = [(row.method, row.client) for row in report.rows]
    assert ran == [(m, c) for m in study.methods for c in population.names]
    assert all(math.isfinite(row.loss) and row.num_test > 0 for row in report.rows)
    stages = {line.split(",")[0] for line in (out / "rounds.csv").read_text().splitlines()[1:]}
    assert "learn" in stages
    assert ("pretrain" in stages) == (study.pretrained is None)
    assert (out / "metanets.safetensors").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == study.recipe
    return report


@pytest.mark.parametrize(
    ("name", "seen", "unseen"),
    [
        pytest.param("cifar10_published_smoke", 4, 0, marks=pytest.mark.slow),
        pytest.param("office10_smoke", 4, 0, marks=pytest.mark.slow),
        pytest.param("domainnet_published_smoke", 6, 0, marks=pytest.mark.slow),
        pytest.param("speech_smoke", 3, 2, marks=pytest.mark.slow),
    ],
)
def test_the_whole_recipe_in_miniature(
    name: str, seen: int, unseen: int, data: Path, tmp_path: Path
) -> None:
    report = checked(recipes.get(name), tmp_path / "run")
    pools = [row.pool for row in report.rows if row.method == "fedl2p"]
    assert (pools.count("seen"), pools.count("unseen")) == (seen, unseen)


def test_trial_models_take_the_weights_of_the_full_one() -> None:
    shape, classes = (3, 64, 64), 10
    full = models.load("fedl2p.models:resnet18_imagenet", shape=shape, classes=classes)
    trial = models.load("fedl2p.models:resnet18_imagenet_coarse", shape=shape, classes=classes)
    trial.load_state_dict(full.state_dict())
