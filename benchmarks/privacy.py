"""What does differential privacy cost? Accuracy against epsilon.

200 seen clients of the digits_sensors recipe, each in a round with probability 1/2, learn the
meta-nets in 12 rounds under every mechanism and several noise multipliers; FedL2P's accuracy is
that on 40 unseen clients. Epsilon (at delta 1e-5) is that of learning the meta-nets. The global
model stands for a public one: it is pre-trained without privacy, by clients of another population.

    python benchmarks/privacy.py --seeds 2 --workers 1

Results are appended to results/privacy.jsonl as they come; a second call computes what is missing
and writes the table, results/privacy.md, and the plot, docs/figures/privacy.svg.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from fedl2p import methods, models
from fedl2p.core.settings import InnerLoop
from fedl2p.data.digits import Digits
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.privacy import accounting
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.rounds import federate, spending
from fedl2p.methods.base.personalizing import model_with_state
from fedl2p.recipes import digits_sensors
from fedl2p.study.settings import Study

matplotlib.use("svg")
import matplotlib.pyplot as plt

CELLS: dict[str, tuple[float, ...]] = {
    "nothing learned": (0.0,),
    "none": (0.0,),
    "central": (0.5, 1.0, 2.0, 4.0),
    "local": (0.3, 1.0, 3.0),
}
ROUNDS, COHORT, CLIENTS = 12, 100, 200
OTHER = 1000
"""Added to the seed for the clients that pre-train the global model."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the plot under one seed."""

    mechanism: str
    noise: float
    seed: int


def study_of(seed: int) -> Study:
    """Return the digits_sensors recipe with many small clients."""
    full = digits_sensors()
    return dataclasses.replace(
        full,
        seed=seed,
        data=Digits(seen=CLIENTS, unseen=40, train=32, validation=24, test=64),
        pretrain=dataclasses.replace(full.pretrain, rounds=80, clients_per_round=20),
        learn=dataclasses.replace(
            full.learn, rounds=ROUNDS, clients_per_round=COHORT, server_rate=0.02
        ),
        settings=dataclasses.replace(full.settings, finetune=InnerLoop(epochs=2)),
    )


@lru_cache(maxsize=1)
def pretrained(seed: int) -> nn.Module:
    """Return a global model that no client of the study has helped to train."""
    study = study_of(seed)
    population = study.data.open(seed + OTHER)
    model = models.build(study.model, shape=population.shape, classes=population.classes, seed=seed)
    fedavg = methods.build("fedavg", study.settings)
    done = federate(fedavg, model, population, rounds=study.pretrain, seed=seed, stage="pretrain")
    return model_with_state(model, done.state)


def privacy_of(trial: Trial) -> Privacy:
    """Return the trial's settings; a hypergradient of FedL2P has a norm of at most 1 anyway."""
    if trial.mechanism in ("none", "nothing learned"):
        return Privacy()
    clip = 1.0 if trial.mechanism == "central" else 0.3
    return Privacy(mechanism=trial.mechanism, noise=trial.noise, clip=clip)  # type: ignore[arg-type]


def run(trial: Trial) -> dict[str, Any]:
    """Learn under the trial's privacy and personalize the unseen clients."""
    torch.set_num_threads(1)
    model = pretrained(trial.seed)
    began = time.process_time()
    study = study_of(trial.seed)
    population = study.data.open(trial.seed)
    method = methods.build("fedl2p", study.settings)
    learning = trial.mechanism != "nothing learned"
    rounds = dataclasses.replace(
        study.learn, rounds=ROUNDS if learning else 0, privacy=privacy_of(trial)
    )
    done = federate(method, model, population, rounds=rounds, seed=trial.seed, stage="learn")
    names = population.seen
    stage = spending("learn", rounds, done.records, names=names, seed=trial.seed, travels=True)
    spent = accounting.spent([("fedl2p", [stage])], given=True, simulated=True)
    out = personalize_all(
        method, model, done.state, population, seed=trial.seed, names=population.unseen
    )
    good = [o.accuracy for o in out if o.failure is None]
    return {
        **dataclasses.asdict(trial),
        "epsilon": spent.stages[0].epsilon if spent.stages else None,
        "releases": spent.stages[0].releases if spent.stages else 0,
        "accuracy": sum(good) / len(out),
        "before": statistics.fmean(o.accuracy_before for o in out if o.failure is None),
        "failed": len(out) - len(good),
        "seconds": time.process_time() - began,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one Markdown table, a mechanism and noise multiplier per line."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# Accuracy against epsilon",
        "",
        f"FedL2P on 40 unseen clients, mean over {seeds} seeds (lowest to highest), in percent. "
        f"{CLIENTS} seen clients, {COHORT} of them expected in each of {ROUNDS} rounds; epsilon at "
        "delta 1e-5, of learning the meta-nets. Made by `benchmarks/privacy.py`.",
        "",
        "| mechanism | noise multiplier | epsilon | accuracy % |",
        "|---|---:|---:|---:|",
    ]
    for mechanism, noises in CELLS.items():
        for noise in noises:
            own = [r for r in rows if (r["mechanism"], r["noise"]) == (mechanism, noise)]
            if own:
                values = sorted(100 * r["accuracy"] for r in own)
                given = [r["epsilon"] for r in own if r["epsilon"] is not None]
                told = f"{statistics.fmean(given):.3g}" if given else "-"
                told = "0" if mechanism == "nothing learned" else told
                lines.append(
                    f"| {mechanism} | {noise or '-'} | {told} | {statistics.fmean(values):.1f} "
                    f"({values[0]:.1f} to {values[-1]:.1f}) |"
                )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the plot."""
    matplotlib.rcParams["svg.hashsalt"] = "fedl2p"  # the same file from the same results
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for mechanism, colour in (("central", "C0"), ("local", "C2")):
        own = [r for r in rows if r["mechanism"] == mechanism and r["epsilon"]]
        axes.scatter(
            [r["epsilon"] for r in own], [100 * r["accuracy"] for r in own], color=colour, s=12
        )
        means = [
            (
                statistics.fmean(r["epsilon"] for r in own if r["noise"] == noise),
                statistics.fmean(100 * r["accuracy"] for r in own if r["noise"] == noise),
            )
            for noise in CELLS[mechanism]
            if any(r["noise"] == noise for r in own)
        ]
        axes.plot(*zip(*sorted(means), strict=True), color=colour, label=mechanism)
    for mechanism, style in (("none", "-"), ("nothing learned", ":")):
        values = [100 * r["accuracy"] for r in rows if r["mechanism"] == mechanism]
        label = {"none": "without privacy"}.get(mechanism, mechanism)
        axes.axhline(statistics.fmean(values), color="grey", linestyle=style, label=label)
    largest = max(r["epsilon"] for r in rows if r["epsilon"])
    axes.set(
        xscale="log",
        xlim=(None, 10 ** math.ceil(math.log10(largest))),
        xlabel="epsilon at delta 1e-5 (lower is more private)",
        ylabel="accuracy on unseen clients, %",
    )
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Compute what is missing, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/privacy.svg"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "privacy.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {Trial(row["mechanism"], row["noise"], row["seed"]) for row in rows}
    wanted = [Trial(m, z, s) for s in range(options.seeds) for m, zs in CELLS.items() for z in zs]
    missing = [trial for trial in wanted if trial not in done]
    with ProcessPoolExecutor(options.workers) as pool, path.open("a") as file:
        for row in pool.map(run, missing):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            cell = f"{row['mechanism']} {row['noise']:g}, seed {row['seed']}"
            print(
                f"{cell}: epsilon {row['epsilon']}, accuracy {row['accuracy']:.3f} "
                f"in {row['seconds']:.1f} s",
                flush=True,
            )
    (options.out / "privacy.md").write_text(table(rows))
    draw(rows, options.figure)


if __name__ == "__main__":
    main()
