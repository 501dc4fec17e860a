"""A run's folder: one study, one process, no way out of it, and resumed from anywhere."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p import recipes
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.data.npz import NpzFolder
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.runs.folder import RunWriter
from fedl2p.runs.population import PopulationInfo
from fedl2p.study.preparation import build_methods, count_stages
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The smallest study on files in a folder that is named from the working folder."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in ("c0", "c1"):
        np.savez(
            tmp_path / "data" / f"{name}.npz",
            x_train=draw.normal(size=(10, 1, 8, 8)).astype(np.float32),
            y_train=np.arange(10) % 2,
        )
    usual = recipes.get("smoke")
    return dataclasses.replace(
        usual,
        data=NpzFolder(Path("data")),
        methods=("fedavg",),
        pretrain=dataclasses.replace(usual.pretrain, rounds=1, clients_per_round=0),
        learn=dataclasses.replace(usual.learn, clients_per_round=0),
    )


def test_a_run_is_resumed_from_another_working_folder(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    report = run_study(study, out)
    stored = Study.load(out)
    assert stored.data == NpzFolder(tmp_path / "data")
    run_study(study, out, resume=True)  # named as before
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run_study(stored, out, resume=True)
    assert str(again.rows) == str(report.rows)  # NaN is not equal to itself
    with pytest.raises(ValueError, match=r"other settings.*data.path is"):
        run_study(study, out, resume=True)


def link_log(out: Path, other: Path) -> None:
    (out / "log.txt").unlink()
    (out / "log.txt").symlink_to(other / "profile")


def link_folder(out: Path, other: Path) -> None:
    shutil.rmtree(out / "clients", ignore_errors=True)
    (out / "clients").symlink_to(other, target_is_directory=True)


def link_checkpoint(out: Path, other: Path) -> None:
    shutil.rmtree(out / "checkpoint" / "pretrain")
    (out / "checkpoint" / "pretrain").symlink_to(other, target_is_directory=True)


@pytest.mark.parametrize("link", [link_log, link_folder, link_checkpoint])
def test_nothing_is_written_through_a_link(
    link: Callable[[Path, Path], None], study: Study, tmp_path: Path
) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    run_study(study, out)
    (out / "results.json").unlink()
    link(out, other)
    with pytest.raises(ValueError, match="is a symbolic link, and nothing is written through such"):
        run_study(study, out, resume=True)
    assert list(other.iterdir()) == []
    assert not (out / "results.json").exists()


def test_the_folder_itself_may_be_a_link(study: Study, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    run_study(study, tmp_path / "run")
    assert (tmp_path / "real" / "results.json").exists()


def test_links_beside_a_run_are_no_matter(study: Study, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").symlink_to(tmp_path)
    RunWriter(tmp_path / "run").check(study, resume=False)


def test_what_a_killed_run_left_unfinished_goes(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config, other = ".config.json.0.unfinished", out / "other" / ".config.json.0.unfinished"
    other.parent.mkdir(parents=True)
    for path in (out / config, other):  # killed while it wrote its first file
        path.write_text("")
    run_study(study, out)
    assert not (out / config).exists()
    checkpoint = out / "checkpoint" / "pretrain" / ".round.0.unfinished"
    checkpoint.write_text("")
    run_study(study, out, resume=True)
    assert not checkpoint.exists()
    assert other.exists()  # of another run, which may be alive


HOLD = """
import sys
from pathlib import Path
from fedl2p.runs.folder import RunWriter
with RunWriter(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_runs_in_a_folder(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"another process runs in {out}; wait for it, or"):
            run_study(study, out)
        assert not (out / "config.json").exists()
    finally:
        holder.kill()
        holder.wait()
        for pipe in (holder.stdin, holder.stdout):
            assert pipe is not None
            pipe.close()
    run_study(study, out)  # a killed process holds nothing
    with RunWriter(out).lock(), pytest.raises(ValueError, match="another process"):
        run_study(study, out, resume=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("c\udcf4", r"'c\\udcf4' is not one line of printable text"),
        ("a\nb", r"'a\\nb' is not one line"),
        ("\x1b[2J", "is not one line"),
        ("a\u202eb", "is not one line"),
        ("", "'' is not one line"),
        ("x" * 201, "is too long for a file of it"),
        ("\u4e16" * 23, "is too long for a file of it"),
    ],
)
def test_names_of_clients_that_cannot_be_names_of_files(name: str, said: str) -> None:
    data = ClientData(Examples(torch.zeros(2, 3), torch.tensor([0, 1])))
    PopulationInfo.of(InMemory({"Zoë 世/..": data}))
    with pytest.raises(ValueError, match=said) as caught:
        PopulationInfo.of(InMemory({"a": data, name: data}))
    assert str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_a_file_whose_name_is_not_text_is_refused_before_anything_is_written(
    study: Study, tmp_path: Path
) -> None:
    shutil.copy(b"data/c0.npz", os.fsencode(tmp_path / "data") + b"/c\xf4.npz")
    with pytest.raises(
        ValueError, match=r"c\\udcf4\.npz.: a client is called like its file, .*; rename"
    ):
        run_study(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (("fedavg", "fedl3p"), "there is no method 'fedl3p'"),
        (("fedavg", "fedavg"), "method 'fedavg' is named twice"),
        (("nowhere:method",), "'nowhere' is not imported"),
    ],
)
def test_methods_are_checked_before_anything_is_written(
    methods: tuple[str, ...], said: str, study: Study, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(study, methods=methods)
    for refuse in (build_methods, count_stages, lambda s: run_study(s, tmp_path / "run")):
        with pytest.raises(ValueError, match=said):
            refuse(wrong)
    assert not (tmp_path / "run").exists()


def test_a_value_of_a_wrong_type_is_refused_before_anything_is_written(
    study: Study, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(study, recipe=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recipe is 3, but must be a valid string"):
        run_study(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_log_may_be_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDL2P_LOG", "json")

    def work() -> None:
        with RunWriter(tmp_path).logging():
            logging.getLogger("fedl2p.test").warning('client "a"\nis %s', "slow")
            raise RuntimeError("torn")

    with pytest.raises(RuntimeError):
        work()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("WARNING", 'client "a"\nis slow'),
        ("ERROR", "stopped"),
    ]
    assert "RuntimeError: torn" in lines[1]["traceback"]
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert not (tmp_path / "log.txt").exists()


def test_another_form_of_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDL2P_LOG", "xml")
    wanted = pytest.raises(ValueError, match="FEDL2P_LOG is 'xml', but must be text or json")
    with wanted, RunWriter(tmp_path).logging():
        raise AssertionError
