"""The app for Flower Hub: built, and run in simulation and on machines, as its README says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p import MetaNets
from fedl2p.data.digits import Digits
from support.flower_simulation import local_superlink

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "apps" / "fedl2p-quickstart"
NODES = ("--federation-config", "num-supernodes=4")
CLIENTS = ("hospital-a", "hospital-b", "hospital-c")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A copy of the app: Flower writes beside it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.fab")
    return Path(shutil.copytree(QUICKSTART, tmp_path / "app", ignore=ignored))


def scores_in(text: str) -> tuple[float, float]:
    found = re.search(r"accuracy of the clients: ([\d.]+) % before, ([\d.]+) % after", text)
    assert found, text[-3000:]
    return float(found[1]), float(found[2])


def test_it_is_built_and_runs_in_simulation(app: Path, tmp_path: Path) -> None:
    with local_superlink(tmp_path) as environment:
        made = subprocess.run(
            ["flwr", "build"], cwd=app, env=environment, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stdout + made.stderr
        (bundle,) = app.glob("*.fab")
        with zipfile.ZipFile(bundle) as content:
            assert {"LICENSE", "README.md", "pyproject.toml"} <= set(content.namelist())
            assert content.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
        config = f'fedavg-rounds=4 fedl2p-rounds=3 out="{tmp_path / "out"}"'
        run = subprocess.run(
            ["flwr", "run", ".", "--stream", "--run-config", config, *NODES],
            cwd=app,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    before, after = scores_in(run.stdout + run.stderr)
    assert after > before + 5
    MetaNets.load(tmp_path / "out" / "metanets")


def test_it_runs_on_three_machines(app: Path, tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "federation")
    sys.path.insert(0, example)
    try:
        from machines import Machines
    finally:
        sys.path.remove(example)
    digits = Digits(seen=3, unseen=0, train=64, validation=32, test=48).open(0)
    folder, out = tmp_path / "federation", tmp_path / "out"
    with Machines(folder) as machines:
        machines.start_superlink()
        for name, source in zip(CLIENTS, digits.names, strict=True):
            home, data = folder / "nodes" / name, digits.open(source)
            home.mkdir(parents=True)
            arrays = {}
            for part in ("train", "validation", "test"):
                examples = getattr(data, part)
                arrays |= {f"x_{part}": examples.x.numpy(), f"y_{part}": examples.y.numpy()}
            np.savez(home / "data.npz", **arrays)
            machines.register(name)
            machines.start_supernode(
                name, {"client": name, "data-path": home / "data.npz", "out": home / "out"}
            )
        run = machines.submit({"fedavg-rounds": 3, "fedl2p-rounds": 2, "out": str(out)}, app=app)
        assert machines.follow(run, seconds=500) == "finished:completed"
        said = machines.flwr("log", run, "here", "--show")
    before, after = scores_in(said)
    assert after > before
    own = [torch.load(folder / "nodes" / n / "out" / "personal.pt") for n in CLIENTS]
    everywhere = torch.load(out / "global.pt")
    assert own[0].keys() == everywhere.keys()
    assert not torch.equal(own[0]["9.bias"], own[1]["9.bias"])
    MetaNets.load(out / "metanets")
