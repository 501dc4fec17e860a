"""``flwr run .``, Flower's own command on this repository, gives the numbers of this process."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedl2p import app, recipes
from fedl2p.core.settings import Compute
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.run import run_study
from support.federation_toys import same
from support.flower_simulation import local_superlink
from support.leftovers import marked

pytest.importorskip("sklearn")

REPOSITORY = Path(__file__).parents[3]
FIELDS = {
    "methods": ["fedl2p"],
    "pretrain": {"rounds": 2},
    "learn": {"rounds": 1},
    "settings": {"finetune": {"epochs": 1}},
}


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment that Flower's command needs, with a local SuperLink of our own."""
    with local_superlink(tmp_path) as values:
        yield values


@pytest.mark.slow
def test_flower_s_command_gives_the_numbers_of_this_process(
    environment: dict[str, str], tmp_path: Path
) -> None:
    project = tmp_path / "fedl2p"
    project.mkdir()
    # Flower may rewrite a pyproject.toml, so it gets a copy of what it needs.
    shutil.copy(REPOSITORY / "pyproject.toml", project)
    shutil.copytree(REPOSITORY / "src", project / "src", ignore=shutil.ignore_patterns("__py*"))
    before = (project / "pyproject.toml").read_bytes()
    out = tmp_path / "flower"
    fields = json.dumps(FIELDS)
    run = subprocess.run(
        [
            *("flwr", "run", ".", "--stream"),
            *("--run-config", f'recipe="smoke" seed=1 out="{out}"'),
            *("--run-config", f"fields='{fields}'"),
        ],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"results are in {out}" in run.stdout + run.stderr
    assert (out / "report.html").exists()
    assert (project / "pyproject.toml").read_bytes() == before

    study = app.study_of(app_context(fields))
    assert study.methods == ("fedl2p",)
    alone = dataclasses.replace(study, compute=Compute(stack_size=1))
    run_study(alone, tmp_path / "here")
    assert results(out) == results(tmp_path / "here")
    assert json.loads((out / "results.json").read_text())["engine"] == "flower"
    for name in ("clients.csv", "rounds.csv"):
        assert timeless(out / name) == timeless(tmp_path / "here" / name) != []
    for name in ("global.safetensors", "metanets.safetensors"):
        assert same(load_tensors(out / name), load_tensors(tmp_path / "here" / name)), name
    assert marked(environment["FEDL2P_TEST"]), "the SuperLink is found by its environment"


def app_context(fields: str) -> Context:
    config = {"recipe": "smoke", "seed": 1, "fields": fields}
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)


def results(folder: Path) -> dict[str, object]:
    told = json.loads((folder / "results.json").read_text())
    told.pop("seconds")
    told.pop("engine")
    for method in (*told["methods"], *told["kinds"]):
        method.pop("seconds_per_client")
    for kind in told["kinds"]:  # hyperparameters stay on their clients, so the server has none
        del kind["mix"], kind["rate"]
    return dict(told)


def timeless(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        line.pop("seconds")
    return lines


def test_the_run_configuration_of_the_repository_is_a_study() -> None:
    section = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    config = section["config"]
    context = Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    assert app.study_of(context) == recipes.get("digits")
    for component in section["components"].values():
        module, _, name = component.partition(":")
        assert module == app.__name__
        assert hasattr(app, name)
