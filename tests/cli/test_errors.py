"""What a user gets wrong: one line on stderr, exit status 2, nothing overwritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedl2p.cli import entry as cli
from fedl2p.cli import parsing
from support.command import refused

SRC = Path(cli.__file__).parents[2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "missing: one of {run, audit, table, "),
        (["walk"], "unrecognized options: walk; available subcommands: run, "),
        (["run"], "the recipe comes first"),
        (["run", "--out", "x", "smoke"], "the recipe comes first"),
        (["run", "smokes", "--out", "x"], "unknown recipe 'smokes'; there are"),
        (["run", "smoke"], "missing from fedl2p run smoke: --out PATH"),
        (["run", "smoke", "--out"], "missing value for argument '--out'"),
        (["run", "smoke", "--out", "x", "--seed", "one"], "--seed: invalid literal"),
        (["run", "smoke", "--out", "x", "--seed", "-1"], "seed is -1"),
        (["run", "smoke", "--out", "x", "--sed", "1"], "unrecognized options: --sed"),
        (["run", "smoke", "--out", "x", "--device", "gpu"], "'gpu' for argument '--device'"),
        (["run", "smoke", "--out", "x", "--engine", "dask"], "engine"),
        (["run", "smoke", "--out", "x", "--compute.stack-size", "0"], "stack_size is 0"),
        (["run", "smoke", "--out", "x", "--learn.rounds", "-3"], "rounds"),
        (["run", "smoke", "--out", "x", "--data.alpha", "0"], "alpha must be above 0"),
        (["run", "npz", "--out", "x"], "no folder of clients is named; give the one"),
        (["run", "npz", "--out", "x", "--data.path", "none"], "none is not a folder"),
        (["run", "smoke", "--out", "x", "--methods", "fedl3p"], "fedl3p"),
        (["run", "smoke", "--out", "x", "--methods", "fedavg", "fedavg"], "twice"),
        (["run", "smoke", "--out", "x", "--methods"], "no method"),
        (["run", "smoke", "--out", "x", "--model", "no.such:thing"], "no.such"),
        (["run", "smoke", "--out", "x", "--pretrained", "no.safetensors"], "no.safetensors"),
        (["personalize", "--run", "none", "--data", "a.npz", "--out", "x"], "none"),
        (["personalize", "--run", "none"], "--data"),
        (["explain"], "missing from fedl2p explain: --run PATH"),
        (["compare"], "no run folder to compare; name at least one"),
        (["compare", "none"], "none"),
        (["report", "none"], "none"),
        (["recipes", "all"], "unrecognized options: all"),
        (["run", "cifar10", "--out", "x"], "get it with `fedl2p data get cifar10"),
        (["run", "speech_smoke", "--out", "x"], "fedl2p data get speech"),
        (["table"], "missing from fedl2p table: RECIPE"),
        (["table", "smokes"], "unknown recipe 'smokes'; there are"),
        (["table", "smoke", "--seeds", "0"], "seeds is 0"),
        (["table", "smoke", "--methods", "fedl3p"], "fedl3p"),
        (["table", "office10"], "get it with `fedl2p data get office10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_and_status_2(
    args: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *args)
    assert list(tmp_path.iterdir()) == []


def test_a_similar_field_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "run", "smoke", "--out", "x", "--learn.round", "3")
    assert "perhaps you meant" in line
    assert "--learn.rounds" in line


def test_an_output_folder_that_is_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    assert str(out) in refused(capsys, "run", "smoke", "--out", out)
    assert out.read_text() == "mine"


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['tyro'] = None; from fedl2p import cli; cli.main(['recipes'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SRC)},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "fedl2p: error: tyro is not installed; install it with: pip install 'fedl2p[cli]'\n"
    )


def write_client(path: Path, **arrays: object) -> Path:
    good = {
        "x_train": np.zeros((6, 1, 8, 8), np.float32),
        "y_train": np.arange(6) % 3,
    }
    np.savez(path, **{k: np.asarray(v) for k, v in (good | arrays).items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x_train": None}, "x_train"),
        ({"y_train": np.arange(5)}, "y_train"),
        ({"x_train": np.zeros((6, 3, 8, 8), np.float32)}, "shape"),
        ({"y_train": np.full(6, 12)}, "12"),
        ({"x_train": np.full((6, 1, 8, 8), np.nan, np.float32)}, "finite"),
        ({"x_test": np.zeros((2, 1, 8, 8), np.float32)}, "y_test"),
    ],
)
def test_a_client_file_that_does_not_fit(
    arrays: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    smoke_run: Path,
) -> None:
    data = write_client(tmp_path / "client.npz", **arrays)
    out = tmp_path / "out"
    assert said in refused(capsys, "personalize", "--run", smoke_run, "--data", data, "--out", out)
    assert not out.exists()


def test_a_client_file_that_is_no_npz(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, smoke_run: Path
) -> None:
    data = tmp_path / "client.npz"
    for content in (b"", b"not a zip", b"PK\x03\x04 torn"):
        data.write_bytes(content)
        args = ("personalize", "--run", smoke_run, "--data", data, "--out", tmp_path / "out")
        assert "client.npz" in refused(capsys, *args)


def test_a_folder_that_holds_a_run_is_left_alone(
    capsys: pytest.CaptureFixture[str], smoke_run: Path
) -> None:
    before = {f: f.stat().st_mtime_ns for f in sorted(smoke_run.rglob("*"))}
    assert "already holds a run" in refused(capsys, "run", "smoke", "--out", smoke_run)
    line = refused(capsys, "run", "smoke", "--out", smoke_run, "--resume", "--seed", "9")
    assert "seed is 0 and 9" in line
    line = refused(capsys, "run", "digits", "--out", smoke_run, "--resume")
    assert "holds a run of 'smoke'" in line
    assert {f: f.stat().st_mtime_ns for f in sorted(smoke_run.rglob("*"))} == before


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Invalid choice ────╮\n"
        "│ Invalid choice 'a'  │\n"
        "│ for argument '--b'. │\n"
        "│ ─────────────────── │\n"
        "│ Perhaps you meant:  │\n"
        "│     --bb INT        │\n"
        "│ ─────────────────── │\n"
        "│ For full helptext,  │\n"
        "│ run fedl2p run      │\n"
        "│ smoke --help        │\n"
        "╰─────────────────────╯\n",
        " Invalid choice       \n"
        " -------------------- \n"
        "  Invalid choice 'a'  \n"
        "  for argument '--b'. \n"
        "  ------------------- \n"
        "  Perhaps you meant:  \n"
        "      --bb INT        \n"
        "  ------------------- \n"
        "  For full helptext,  \n"
        "  run fedl2p run      \n"
        "  smoke --help        \n"
        "                      \n",
    ],
    ids=["boxes", "plain"],
)
def test_boxes_become_one_line(box: str) -> None:
    wanted = (
        "invalid choice 'a' for argument '--b'; perhaps you meant --bb; see fedl2p run smoke --help"
    )
    assert parsing.one_line(box) == wanted
    assert parsing.one_line(box.replace("Invalid", "\x1b[1;31mInvalid\x1b[0m")) == wanted


def test_tensorboard_is_refused_before_anything_is_written_where_it_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "run"
    assert "TensorBoard is not installed" in refused(
        capsys, "run", "smoke", "--out", out, "--tensorboard"
    )
    assert not out.exists()
