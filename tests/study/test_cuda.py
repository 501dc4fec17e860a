"""Whole studies and every method on a GPU, against the CPU; skipped where there is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p import methods, recipes
from fedl2p.core.settings import Compute, InnerLoop
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.clients.in_process import in_process
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import Grid, LocalTraining, Settings
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.new_client import personalize_new_client
from fedl2p.study.run import run_study
from support.baseline_tools import make_client
from support.nets import nested_net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU = "cuda"
SETTINGS = Settings(
    finetune=InnerLoop(epochs=2, batch_size=8),
    finetune_rate=0.01,
    local=LocalTraining(epochs=1, batch_size=8, rate=0.05),
    local_epochs=1,
    grid=Grid(mixes=(0.0, 0.5), rates=(0.01, 0.05)),
    alone_steps=2,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the recipe smoke: on the CPU, on the GPU and on the GPU again."""
    base = tmp_path_factory.mktemp("cuda")
    folders = {}
    for name, device in (("cpu", "cpu"), (GPU, GPU), ("again", GPU)):
        folders[name] = base / name
        run_study(dataclasses.replace(recipes.get("smoke"), device=device), folders[name])
    return folders


def numbers(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    told = json.loads((folder / "results.json").read_text())["methods"]
    return {(m["method"], m["pool"]): m for m in told}


def test_a_study_gives_what_it_gives_on_the_cpu(runs: dict[str, Path]) -> None:
    told = json.loads((runs[GPU] / "results.json").read_text())
    assert told["device"] == GPU
    wanted, ours, again = (numbers(runs[name]) for name in ("cpu", GPU, "again"))
    assert ours.keys() == wanted.keys()
    for row, told in wanted.items():
        for other in (ours[row], again[row]):
            assert other["loss"] == pytest.approx(told["loss"], rel=0.02), row
            assert other["accuracy"] == pytest.approx(told["accuracy"], abs=0.025), row


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_new_client_of_either_run_on_either_device(
    runs: dict[str, Path], tmp_path: Path, device: str
) -> None:
    rng = np.random.default_rng(0)
    shape = (20, 1, 8, 8)
    np.savez(
        tmp_path / "c.npz",
        x_train=rng.random(shape, dtype=np.float32),
        y_train=np.arange(20) % 10,
    )
    for run in ("cpu", GPU):
        out = tmp_path / run
        personalize_new_client(runs[run], tmp_path / "c.npz", out, device=device)
    (a, b) = (sorted((tmp_path / run).glob("*.safetensors")) for run in ("cpu", GPU))
    assert a
    for mine, other in zip(a, b, strict=True):
        for name, value in load_tensors(mine).items():
            torch.testing.assert_close(value, load_tensors(other)[name], rtol=0.02, atol=0.02)


# l2p has no rounds of its own: it begins with the meta-nets that fedl2p learned
@pytest.mark.parametrize("name", [n for n in methods.names() if n != "l2p"])
def test_rounds_of_a_method_give_what_they_give_on_the_cpu(name: str) -> None:
    done = {}
    for device in ("cpu", GPU):
        chosen = methods.build(name, SETTINGS)
        people = {c.name: c.data for c in map(make_client, range(4))}
        population = InMemory(people)
        model = nested_net()
        clients = in_process(model, population, {name: chosen}, device=device)
        done[device] = federate(
            chosen,
            model,
            population,
            rounds=Rounds(rounds=2, keep="last"),
            seed=0,
            stage="learn",
            clients=clients,
        )
    ours, wanted = done[GPU], done["cpu"]
    for mine, other in zip(ours.records, wanted.records, strict=True):
        assert mine.failures == other.failures == 0
        assert mine.loss == pytest.approx(other.loss, rel=1e-5, nan_ok=True)
    for key, value in wanted.state.items():
        torch.testing.assert_close(ours.state[key].cpu(), value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("compute", [Compute(precision="bfloat16"), Compute(channels_last=True)])
def test_a_study_in_other_precision_and_layout(compute: Compute, tmp_path: Path) -> None:
    study = dataclasses.replace(recipes.get("smoke"), device=GPU, compute=compute)
    report = run_study(study, tmp_path / "run")
    assert all(np.isfinite(row.loss) for row in report.rows)
