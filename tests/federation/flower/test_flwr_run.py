"""``flwr run .``, Flower's own command on this repository, gives the numbers of this process."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
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
from support.leftovers import marked, wait_until_gone

pytest.importorskip("sklearn")

REPOSITORY = Path(__file__).parents[3]
FIELDS = {
    "methods": ["fedl2p"],
    "pretrain": {"rounds": 2},
    "learn": {"rounds": 1},
    "settings": {"finetune": {"epochs": 1}},
}


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Run a local SuperLink of our own; yield the environment that Flower's command needs."""
    api, control = free_ports(2)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
        f'address = "127.0.0.1:{api}"\ninsecure = true\n'
    )
    mark = f"fedl2p-{tmp_path}"
    values = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(app.__file__).parents[1]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # The packages are here; otherwise Flower's runtime installs them anew for every run.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "FEDL2P_TEST": mark,
    }
    address = ("--host", "127.0.0.1", "--port", str(api))
    log = (tmp_path / "superlink.log").open("w")
    superlink = subprocess.Popen(
        [
            *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
            *("--control-api-address", f"127.0.0.1:{control}", *address),
        ],
        env=values,
        stdout=log,
        stderr=log,
    )
    try:
        wait_for_port(api, superlink)
        yield values
    finally:
        superlink.terminate()
        superlink.wait(timeout=60)
        log.close()
        wait_until_gone(mark, seconds=60)


def wait_for_port(port: int, process: subprocess.Popen[bytes], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the SuperLink has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the SuperLink does not listen")


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
    for method in told["methods"]:
        method.pop("seconds_per_client")
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
