"""A made-up but realistic run folder, for the tests of the reporting room."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
from pathlib import Path

from fedl2p.runs.columns import ROUND_COLUMNS
from fedl2p.runs.kinds import summarise_kinds
from fedl2p.runs.reading import read_strategies
from fedl2p.runs.results import Report, Row

KINDS = ("inversion", "blur", "noise", "rotation", "thickness", "brightness", "pixelation", "clean")
UNSEEN_KINDS = (*KINDS, "occlusion", "contrast")
HARDNESS = dict(zip(UNSEEN_KINDS, (2.4, 0.9, 0.7, 1.2, 0.5, 0.2, 0.6, 0.0, 1.0, 1.6), strict=True))
METHODS = {  # share of the possible gain that a method reaches, and seconds per client
    "fedavg": (0.0, 0.0),
    "finetuning-global": (0.45, 0.21),
    "finetuning-client": (0.62, 0.22),
    "bestfixed": (0.74, 0.22),
    "local": (-0.2, 0.35),
    "gridsearch": (0.80, 5.4),
    "l2p": (0.6, 2.8),
    "fedl2p": (0.82, 0.24),
}
NORMS = ("features.0.norm", "features.1.norm", "features.2.norm")
PARTS = ("conv.weight", "norm.weight", "norm.bias")
PARAMS = (*(f"features.{i}.{p}" for i in range(3) for p in PARTS), "head.weight", "head.bias")


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    seen: int = 40,
    unseen: int = 20,
    methods: tuple[str, ...] = tuple(METHODS),
    norms: tuple[str, ...] = NORMS,
    params: tuple[str, ...] = PARAMS,
    kinds: bool = True,
    failed: dict[str, str] | None = None,
    share: float | None = None,
    name: str = "client-{:03d}",
) -> Report:
    """Write every file of a run folder except the page; ``share`` is how well FedL2P does."""
    draw = random.Random(f"synthetic {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    clients = _clients(draw, seen, unseen, kinds, name)
    shares = {m: METHODS[m][0] for m in methods}
    if share is not None:
        shares["fedl2p"] = share
    rows = [
        _row(draw, method, shares[method], client, (failed or {}).get(client["name"]))
        for method in methods
        for client in clients
    ]
    report = Report(
        recipe="digits",
        seed=seed,
        engine="in-process",
        device="cpu",
        versions={"python": "3.11.9", "torch": "2.13.0", "flwr": "1.41.0", "fedl2p": "0.1.0"},
        seconds={"pretrain": 21.4, "learn": 96.2, "personalize": 88.0, "total": 209.3},
        bytes_per_client_round={
            "pretrain": {"down": 41320.0, "up": 41320.0},
            "learn": {"down": 52812.0, "up": 52812.0},
        },
        rows=tuple(rows),
    )
    _write_others(folder, draw, clients, seed, methods)
    for method in ("fedl2p", "l2p"):
        if method in methods:
            _write_strategies(folder / "clients" / method, draw, clients, norms, params)
    about = {client["name"]: client["about"] for client in clients}
    strategies = read_strategies(folder, about)
    report = dataclasses.replace(report, kinds=summarise_kinds(report.rows, about, strategies))
    report.save(folder)
    return report


def _clients(draw: random.Random, seen: int, unseen: int, kinds: bool, name: str) -> list[dict]:
    clients = []
    for i in range(seen + unseen):
        pool = "seen" if i < seen else "unseen"
        choice = KINDS if pool == "seen" else UNSEEN_KINDS
        kind, severity = choice[i % len(choice)], draw.uniform(0.4, 1.0)
        about = {"sensor": kind, "severity": severity, "label_entropy": draw.uniform(0.8, 2.1)}
        clients.append(
            {
                "name": name.format(i),
                "pool": pool,
                "about": about if kinds else {},
                "hardness": HARDNESS[kind] * severity,
                "test": draw.randint(100, 140),
            }
        )
    return clients


def _row(draw: random.Random, method: str, share: float, client: dict, failure: str | None) -> Row:
    before = max(0.08, 0.93 - 0.36 * client["hardness"] + draw.gauss(0, 0.02))
    best = 0.95 - 0.07 * client["hardness"]
    after = before + share * (best - before) + (draw.gauss(0, 0.02) if share else 0.0)
    test = client["test"]
    before, after = (round(test * min(1.0, max(0.0, x))) / test for x in (before, after))
    return Row(
        method=method,
        client=client["name"],
        pool=client["pool"],
        num_train=96,
        num_test=test,
        accuracy_before=before,
        accuracy=after,
        loss_before=2.4 * (1 - before),
        loss=2.2 * (1 - after),
        seconds=METHODS[method][1] * draw.uniform(0.9, 1.1),
        failure=failure,
    )


def _write_others(
    folder: Path, draw: random.Random, clients: list[dict], seed: int, methods: tuple[str, ...]
) -> None:
    entries = {c["name"]: {"pool": c["pool"], "about": c["about"]} for c in clients}
    population = {"classes": 10, "shape": [1, 8, 8], "clients": entries}
    (folder / "population.json").write_text(json.dumps(population))
    config = {
        "recipe": "digits",
        "seed": seed,
        "data": {"clients": len(clients), "alpha": 0.5},
        "model": "fedl2p.models:SmallConvNet",
        "pretrain": {"rounds": 40, "clients_per_round": 10},
        "learn": {"rounds": 25, "clients_per_round": 10, "strategy": "fedavg"},
        "settings": {"meta": {"mode": "trajectory", "as_published": False}},
        "methods": list(methods),
    }
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "rounds.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROUND_COLUMNS)
        for stage, rounds, end, pace in (("pretrain", 41, 0.55, 8), ("learn", 26, 0.62, 5)):
            for r in range(1, rounds + 1):
                loss = end + (2.3 - end) * math.exp(-(r - 1) / pace) + abs(draw.gauss(0, 0.02))
                writer.writerow([stage, r, 10, loss, 1 - loss / 2.6, 0.6, 413200, 413200, 0])
        for r in (1, 2):  # the second one only judges what the first one made
            writer.writerow(["bestfixed", r, 40, 0.6, 0.8, 0.6, 413200, 413200, 0])


def _write_strategies(
    folder: Path,
    draw: random.Random,
    clients: list[dict],
    norms: tuple[str, ...],
    params: tuple[str, ...],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, client in enumerate(clients):
        hard = client["hardness"]
        far = {
            n: 0.02 * math.exp(1.6 * hard - 0.5 * k % 3 + draw.gauss(0, 0.3))
            for k, n in enumerate(norms)
        }
        mix = {
            n: min(1.0, max(0.0, 0.15 + 0.35 * hard - 0.1 * (k % 3))) for k, n in enumerate(norms)
        }
        rate = {
            p: 0.01 * math.exp(0.7 * hard + 0.9 * ((k * 5) % 4) + draw.gauss(0, 0.1))
            for k, p in enumerate(params)
        }
        content = {
            "client": client["name"],
            "method": folder.name,
            "mix": mix,
            "rate": rate,
            "divergence": far if norms else None,
            "moments": None,
            **dict.fromkeys(("gradients", "loss", "labels", "size")),
        }
        (folder / f"{i}.json").write_text(json.dumps(content))
