"""The command from a user's side: what it prints, what it writes, how it stops."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p import models, personalize, recipes
from fedl2p.cli import entry as cli
from fedl2p.data.files.npz_client import read_npz_client
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.new_client import load_run, personalize_new_client
from fedl2p.study.settings import METHODS, Study

SRC = Path(cli.__file__).parents[2]


def call(*args: object) -> int:
    """Run the command in this process and return its exit status."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def start(*args: object) -> subprocess.Popen[str]:
    """Run the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedl2p", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_a_run_prints_the_table_and_the_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ("--methods", "finetuning-client", "fedl2p", "--learn.rounds", 1, "--seed", 4)
    process = start("run", "smoke", "--out", out, *changes)
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    assert complained == ""  # no terminal, no progress bar
    assert "finetuning-client" in said
    assert said.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert (out / "report.html").stat().st_size > 1000
    config = json.loads((out / "config.json").read_text())
    assert config["learn"]["rounds"] == 1
    assert config["seed"] == 4
    assert config["methods"] == ["finetuning-client", "fedl2p"]


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a run"
    args = ("run", "smoke", "--methods", "fedavg", "--pretrain.rounds", 90, "--out", out)
    process = start(*args)
    while not list((out / "checkpoint" / "pretrain").glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ""
    line = complained.strip()
    assert line == (f"fedl2p: interrupted; go on with: fedl2p run smoke --out '{out}' --resume")
    with (out / "rounds.csv").open() as file:
        before = len(list(csv.DictReader(file)))
    assert before < 91
    # The line can be followed as it is: the folder knows its fields.
    assert call("run", "smoke", "--out", out, "--resume") == 0
    with (out / "rounds.csv").open() as file:
        assert [int(row["round"]) for row in csv.DictReader(file)] == list(range(1, 92))
    assert "report.html" in capsys.readouterr().out


def test_resume_starts_where_there_is_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("run", "smoke", "--methods", "fedavg", "--out", out, "--resume") == 0
    assert (out / "results.json").exists()


def test_compare(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", smoke_run) == 0
    said = capsys.readouterr().out
    assert "unseen clients" in said
    assert "gridsearch" in said


def test_report_again(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", smoke_run) == 0
    assert capsys.readouterr().out == f"report: {smoke_run / 'report.html'}\n"
    assert "</html>" in (smoke_run / "report.html").read_text()
    (smoke_run / "report.html").unlink()


def write_client(path: Path, *, test: bool) -> Path:
    population = recipes.get("smoke").data.open(7)
    data = population.open(population.unseen[0])
    assert data.test is not None
    arrays = {"x_train": data.train.x.numpy(), "y_train": data.train.y.numpy()}
    if test:
        arrays |= {"x_test": data.test.x.numpy(), "y_test": data.test.y.numpy()}
    np.savez(path, **arrays)
    return path


def test_personalize_a_new_client(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_client(tmp_path / "me.npz", test=True)
    out = tmp_path / "out"
    args = ("personalize", "--run", smoke_run, "--data", data, "--out", out)
    assert call(*args) == 0
    said = capsys.readouterr().out
    assert "% before" in said
    assert str(out / "model.safetensors") in said
    assert {f.name for f in out.iterdir()} == {
        *("model.safetensors", "hyperparams.json", "outcome.json"),
    }
    outcome = json.loads((out / "outcome.json").read_text())
    # The file holds a plain state_dict of the recipe's model; judged by it, the same accuracy.
    model = models.load(recipes.get("smoke").model, shape=(1, 8, 8), classes=10)
    model.load_state_dict(load_tensors(out / "model.safetensors"))
    arrays = np.load(data)
    with torch.no_grad():
        guesses = model.eval()(torch.from_numpy(arrays["x_test"])).argmax(1).numpy()
    assert outcome["accuracy"] == pytest.approx((guesses == arrays["y_test"]).mean())
    strategy = json.loads((out / "hyperparams.json").read_text())
    assert all(0 <= mix <= 1 for mix in strategy["mix"].values())
    assert all(rate >= 0 for rate in strategy["rate"].values())
    # A second time it refuses and changes nothing.
    before = (out / "model.safetensors").read_bytes()
    assert call(*args) == 2
    assert "already holds model.safetensors" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before


def write_folder(folder: Path, pools: dict[str, int]) -> Path:
    """Write clients whose images are neither square nor of our size, one bright bar per class."""
    draw = np.random.default_rng(0)
    for pool, clients in pools.items():
        (folder / pool).mkdir(parents=True)
        for i in range(clients):
            arrays: dict[str, np.ndarray] = {}
            for part, count in (("train", 25), ("test", 9)):
                y = draw.integers(0, 3, count)
                x = draw.integers(0, 60, (count, 1, 6, 10), dtype=np.uint8)
                x[np.arange(count), 0, 2 * y] += 150
                arrays |= {f"x_{part}": x, f"y_{part}": y}
            np.savez(folder / pool / f"{pool}-{i}.npz", **arrays)
    return folder


QUICK = (
    *("--pretrain.rounds", 2, "--learn.rounds", 2, "--settings.local-epochs", 1),
    *("--settings.finetune.epochs", 1, "--settings.alone-steps", 1),
    *("--settings.grid.rates", 0.1, "--settings.grid.mixes", 0.0, 1.0),
)


def test_a_users_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "data", {"seen": 3, "unseen": 1})
    out = tmp_path / "run"
    assert call("run", "npz", "--data.path", data, "--out", out, *QUICK) == 0
    assert "unseen clients" in capsys.readouterr().out
    world = json.loads((out / "population.json").read_text())
    assert (world["classes"], world["shape"]) == (3, [1, 6, 10])
    assert {name: client["pool"] for name, client in world["clients"].items()} == {
        **{f"seen-{i}": "seen" for i in range(3)},
        "unseen-0": "unseen",
    }
    told = json.loads((out / "results.json").read_text())
    assert told["failures"] == []
    assert "Global model, sent once" in (out / "report.html").read_text()
    assert {(m["method"], m["pool"]) for m in told["methods"]} == {
        (name, pool) for name in METHODS for pool in ("seen", "unseen")
    }
    # And one more client afterwards.
    new = data / "unseen" / "unseen-0.npz"
    assert call("personalize", "--run", out, "--data", new, "--out", tmp_path / "new") == 0
    assert json.loads((tmp_path / "new" / "outcome.json").read_text())["num_train"] == 25
    # The folder remembers where the data lie.
    capsys.readouterr()
    assert call("run", "npz", "--out", out, "--resume") == 0


def test_personalize_goes_by_the_statistics_of_the_run(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("population.json", "global.safetensors", "metanets.safetensors", "metanets.json"):
        shutil.copy(smoke_run / name, run)
    config = json.loads((smoke_run / "config.json").read_text())
    assert config["settings"]["finetune"]["statistics"] == "corrected"
    data = write_client(tmp_path / "me.npz", test=False)
    models_of = {}
    for statistics in ("corrected", "published"):
        config["settings"]["finetune"]["statistics"] = statistics
        (run / "config.json").write_text(json.dumps(config))
        new = personalize_new_client(run, data, tmp_path / statistics)
        models_of[statistics] = new.personalized.model.state_dict()
    _, model, metanets = load_run(run)
    client = read_npz_client(data, split=False)
    inner = Study.load(run).settings.finetune
    wanted = personalize(
        model,
        metanets,
        client,
        epochs=inner.epochs,
        batch_size=inner.batch_size,
        statistics="published",
    ).model.state_dict()
    assert all(torch.equal(models_of["published"][k], v) for k, v in wanted.items())
    assert not all(torch.equal(models_of["corrected"][k], v) for k, v in wanted.items())


def test_personalize_without_test_examples(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_client(tmp_path / "me.npz", test=False)
    out = tmp_path / "out"
    assert call("personalize", "--run", smoke_run, "--data", data, "--out", out) == 0
    assert "there are none to test on" in capsys.readouterr().out
    assert not (out / "outcome.json").exists()


def test_personalize_warns_in_one_line_of_a_client_far_outside(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(np.load(write_client(tmp_path / "me.npz", test=False)))
    np.savez(tmp_path / "me.npz", **{**arrays, "x_train": 5 * arrays["x_train"]})
    args = ("--run", smoke_run, "--data", tmp_path / "me.npz", "--out", tmp_path / "out")
    assert call("personalize", *args) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedl2p: warning: ")
    assert "far outside what the meta-nets were learned on" in line


def test_personalize_needs_meta_nets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert call("run", "smoke", "--methods", "fedavg", "--out", run) == 0
    capsys.readouterr()
    data = write_client(tmp_path / "me.npz", test=True)
    assert call("personalize", "--run", run, "--data", data, "--out", tmp_path / "out") == 2
    assert "metanets.safetensors" in capsys.readouterr().err
