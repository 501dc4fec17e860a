"""fedl2p explain, from a user's side: on a finished run, on a new client, on what does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedl2p import recipes
from fedl2p.core.metanets import MetaNets
from fedl2p.core.settings import MetaNetsConfig
from fedl2p.explain.sentences import TIMES
from fedl2p.study.run import run_study
from support.command import call, refused

RUN_FILES = (
    *("config.json", "population.json", "global.safetensors"),
    *("metanets.safetensors", "metanets.json"),
)


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    """A copy of what a finished run keeps, which a test may change."""
    copy = tmp_path / "run"
    copy.mkdir()
    for name in RUN_FILES:
        shutil.copy(smoke_run / name, copy)
    shutil.copytree(smoke_run / "clients" / "fedl2p", copy / "clients" / "fedl2p")
    return copy


def explain(run: Path, client: str, out: Path, *further: str) -> dict:
    assert call("explain", "--run", run, "--client", client, "--out", out, *further) == 0
    return json.loads((out / f"{client}.json").read_text())


def change_config(run: Path, **fields: object) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("client", ["seen-01", "unseen-02"])
def test_a_client_of_a_run(
    client: str, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.stat().st_mtime_ns for f in smoke_run.rglob("*")}
    told = explain(smoke_run, client, tmp_path / "out")
    said = capsys.readouterr().out
    assert said.startswith(f"{client} ({client.split('-')[0]}; ")
    assert said.splitlines()[-2:] == [
        f"numbers: {tmp_path / 'out' / client}.json",
        f"picture: {tmp_path / 'out' / client}.html",
    ]
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f"{client}.json", f"{client}.html"}
    assert {f: f.stat().st_mtime_ns for f in smoke_run.rglob("*")} == before
    # What is explained is what the client fine-tuned with, from the profile that it had.
    kept = json.loads((smoke_run / "clients" / "fedl2p" / f"{client}.json").read_text())
    for kind in ("mix", "rate"):
        for name, value in kept[kind].items():
            assert told[kind][name]["value"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    for name, value in kept["divergence"].items():
        assert told["profile"][f"divergence of {name}"]["value"] == pytest.approx(value)
    for name, (mean, sd) in kept["moments"].items():
        assert told["profile"][f"input mean of {name}"]["value"] == pytest.approx(mean)
        assert told["profile"][f"input sd of {name}"]["value"] == pytest.approx(sd)
    for name, value in kept["gradients"].items():
        assert told["profile"][f"relative gradient of {name}"]["value"] == pytest.approx(value)
    for name, value in (
        ("global model's loss", kept["loss"]["loss"]),
        ("global model's accuracy", kept["loss"]["accuracy"]),
        ("label entropy", kept["labels"]["entropy"]),
        ("number of classes", kept["labels"]["classes"]),
        ("label agreement", kept["labels"]["agreement"]),
        ("number of examples", kept["size"]["examples"]),
    ):
        assert told["profile"][name]["value"] == pytest.approx(value)
    assert (
        f"{kept['size']['examples']:g}, typical"
        in (tmp_path / "out" / f"{client}.html").read_text()
    )
    # The parts add up.
    assert told["gap"] <= 0.01
    for kind in ("mix", "rate"):
        for one in told[kind].values():
            parts = one["attributions"].values()
            assert abs(math.fsum(parts) - one["change"]) <= 0.01 * math.fsum(map(abs, parts))
    assert math.fsum(entry["share"] for entry in told["profile"].values()) == pytest.approx(1)


def test_the_typical_profile_is_the_median_of_the_seen_clients(
    smoke_run: Path, tmp_path: Path
) -> None:
    told = explain(smoke_run, "unseen-00", tmp_path)
    files = sorted((smoke_run / "clients" / "fedl2p").glob("seen-*.json"))
    kept = [json.loads(f.read_text()) for f in files]
    assert told["baseline"] == f"median profile of {len(kept)} seen clients"
    for name in kept[0]["divergence"]:
        wanted = np.median([one["divergence"][name] for one in kept])
        assert told["profile"][f"divergence of {name}"]["typical"] == pytest.approx(wanted)
    wanted = np.median([one["moments"]["conv1"][1] for one in kept])
    assert told["profile"]["input sd of conv1"]["typical"] == pytest.approx(wanted)


@pytest.mark.slow
def test_profiles_that_were_not_recorded_are_made_again_from_the_data(
    run: Path, tmp_path: Path
) -> None:
    recorded = explain(run, "unseen-01", tmp_path / "recorded")
    shutil.rmtree(run / "clients")
    again = explain(run, "unseen-01", tmp_path / "again")
    for name, entry in recorded["profile"].items():
        for field in ("value", "typical"):
            assert again["profile"][name][field] == pytest.approx(entry[field], rel=1e-4, abs=1e-6)
    for name, one in recorded["mix"].items():
        assert again["mix"][name]["change"] == pytest.approx(one["change"], abs=1e-4)


def test_a_new_client_by_its_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data of a client that the run knows, given as a file, has the same explanation."""
    data = recipes.get("smoke").data.open(0).open("unseen-03")
    file = tmp_path / "me & mine.npz"
    np.savez(file, x_train=data.train.x.numpy(), y_train=data.train.y.numpy())
    assert call("explain", "--run", run, "--data", file) == 0
    assert capsys.readouterr().out.startswith("me & mine (new), compared with the median profile")
    folder = run / "explain" / "new"
    new = json.loads((folder / "me %26 mine.json").read_text())
    assert (folder / "me %26 mine.html").exists()
    known = explain(run, "unseen-03", tmp_path / "known")
    for kind in ("mix", "rate"):
        for name, one in known[kind].items():
            assert new[kind][name]["change"] == pytest.approx(one["change"], abs=1e-4)


def test_the_usual_place_is_in_the_run_and_is_written_again(run: Path) -> None:
    for _ in range(2):
        assert call("explain", "--run", run, "--client", "seen-00") == 0
    assert {f.name for f in (run / "explain").iterdir()} == {"seen-00.json", "seen-00.html"}


def test_a_bound_is_said_to_be_active(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nets = MetaNets.load(run)
    with torch.no_grad():
        nets.base_mix.fill_(2.0)
    nets.save(run)
    told = explain(run, "seen-00", run / "out")
    every = [*told["mix"].values(), *told["rate"].values()]
    count = sum(not math.isclose(o["value"], o["before_bounds"], rel_tol=1e-6) for o in every)
    words = " ".join(capsys.readouterr().out.split())
    assert f"{count} of 14 hyperparameters are at a bound" in words
    assert count >= 3
    assert all(one["value"] == 1.0 for one in told["mix"].values())
    assert all(one["before_bounds"] > 1 for one in told["mix"].values())
    assert any(abs(part) > 1e-4 for part in told["mix"]["norm1"]["attributions"].values())


def test_published_nets_have_rates_that_are_no_logarithms(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = MetaNets.load(run).sites
    MetaNets(sites, config=MetaNetsConfig.published(base_rate=0.01)).save(run)
    told = explain(run, "seen-00", run / "out")
    assert told["rates_as"] == "rate"
    one = told["rate"]["head.bias"]
    assert math.fsum(one["attributions"].values()) == pytest.approx(
        one["value"] - one["typical"], rel=0.02
    )
    assert TIMES not in capsys.readouterr().out


def plain_net(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a small net without batch-norm."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), 12), nn.ReLU(), nn.Linear(12, classes)
    )


def test_a_model_without_batch_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = recipes.get("smoke")
    study = dataclasses.replace(
        study,
        model=f"{__name__}:plain_net",
        methods=("fedl2p",),
        pretrain=dataclasses.replace(study.pretrain, rounds=2),
        learn=dataclasses.replace(study.learn, rounds=1),
    )
    run_study(study, tmp_path / "run")
    assert f"--model {__name__}:plain_net" in refused(
        capsys, "explain", "--run", tmp_path / "run", "--client", "unseen-00"
    )
    named = ("--model", f"{__name__}:plain_net")
    told = explain(tmp_path / "run", "unseen-00", tmp_path / "out", *named)
    assert "no batch-norm layer" in " ".join(capsys.readouterr().out.split())
    assert told["mix"] == {}
    assert set(told["means"]) == {"rate"}
    assert set(told["rate"]) == {"1.weight", "1.bias", "3.weight", "3.bias"}


# ------------------------------------------------------------ what does not fit


def test_one_client_must_be_named(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    wanted = "give one of --client NAME, a client of the run, and --data FILE.npz, a new client"
    assert refused(capsys, "explain", "--run", run) == wanted
    both = ("--client", "seen-00", "--data", "x.npz")
    assert refused(capsys, "explain", "--run", run, *both) == wanted
    assert "--run" in refused(capsys, "explain", "--client", "a")


def test_an_unknown_client_gets_similar_names(
    capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    line = refused(capsys, "explain", "--run", run, "--client", "unseen-2")
    assert "has no client 'unseen-2'; among its 10 clients are unseen-02, " in line
    assert line.endswith("for a new client give its file by --data")
    line = refused(capsys, "explain", "--run", run, "--client", "../../x")
    assert "are seen-00, seen-01, seen-02; " in line
    assert not (run / "explain").exists()


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["fedavg", "local"], "its methods are fedavg, local; explain a run of the method fedl2p"),
        (["fedavg", "fedl2p-constant"], "learned no meta-nets that read profiles"),
    ],
)
def test_a_run_without_fedl2p(
    methods: list[str], said: str, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    change_config(run, methods=methods)
    assert said in refused(capsys, "explain", "--run", run, "--client", "seen-00")


def test_constant_meta_nets(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    sites = MetaNets.load(run).sites
    MetaNets(sites, config=MetaNetsConfig(constant=True)).save(run)
    line = refused(capsys, "explain", "--run", run, "--client", "seen-00")
    assert "write the same hyperparameters for every client" in line


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_file_of_the_run_is_missing(
    name: str, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    (run / name).unlink()
    line = refused(capsys, "explain", "--run", run, "--client", "seen-00")
    assert f"{run / name} is missing; give the folder of a finished run" in line


def test_a_damaged_population_or_record(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    args = ("explain", "--run", run, "--client", "seen-00")
    record = run / "clients" / "fedl2p" / "seen-03.json"
    content = json.loads(record.read_text())
    for bad in ({"divergence": None}, {"moments": {}}, {"divergence": {"norm1": None}}):
        record.write_text(json.dumps(content | bad))
        assert f"{record} is damaged: it lacks the profile" in refused(capsys, *args)
    record.write_text(json.dumps(content))
    world = json.loads((run / "population.json").read_text())
    for bad in ({"clients": {"seen-00": {}}}, {"clients": []}, {"clients": None}):
        (run / "population.json").write_text(json.dumps(world | bad))
        assert f"{run / 'population.json'} is damaged" in refused(capsys, *args)
    unseen = {"seen-00": {"pool": "unseen", "about": {}}}
    (run / "population.json").write_text(json.dumps(world | {"clients": unseen}))
    assert "names no seen client" in refused(capsys, *args)
    assert not (run / "explain").exists()


def test_data_that_no_longer_hold_the_client(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    world = json.loads((run / "population.json").read_text())
    world["clients"]["gone"] = {"pool": "unseen", "about": {}}
    (run / "population.json").write_text(json.dumps(world))
    line = refused(capsys, "explain", "--run", run, "--client", "gone")
    assert "have no client 'gone' any more" in line


def test_a_new_clients_file_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "me.npz"
    args = ("explain", "--run", run, "--data", file)
    assert "there is no such file" in refused(capsys, *args)
    np.savez(file, x_train=np.zeros((4, 3, 8, 8), np.float32), y_train=np.arange(4))
    assert "shape" in refused(capsys, *args)
    assert not (run / "explain").exists()


def test_a_place_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    line = refused(capsys, "explain", "--run", run, "--client", "seen-00", "--out", out)
    assert f"cannot write into {out}" in line
    assert out.read_text() == "mine"


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("explain", "--help") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option in ("--run", "--client", "--data", "--out", "--device"):
        assert option in said
    assert "median profile" in said
    assert "`" not in said
