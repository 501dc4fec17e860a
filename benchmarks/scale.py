"""What registered clients cost that are not asked, and what many updates cost a server's memory.

Populations of 100, 10,000 and 1,000,000 clients, whose names are computed and whose data are made
when a client is opened. 100 of them take part in each round of FedAvg with a small convolutional
net, and then of FedL2P's learning. Every number of clients has a process of its own; the numbers
take turns, several times over, so that whatever else the machine does falls on all of them alike.
Then clients that do nothing answer with a large state, one per call: the mean is a running sum, so
that peak memory should not grow with them.

    python benchmarks/scale.py [--rounds 5] [--learn 2] [--repeats 3]

Prints two tables and writes them to benchmarks/results/scale.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedl2p import methods, models
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute, InnerLoop
from fedl2p.data.population import NumberedNames, Population
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.settings import LocalTraining, Settings
from fedl2p.seeds import generator

RESULT = Path(__file__).parent / "results" / "scale.md"
STATUS = Path("/proc/self/status")
REGISTERED = (100, 10_000, 1_000_000)
COHORT = 100
SHAPE, CLASSES, TRAIN, VALIDATION = (1, 16, 16), 10, 32, 16
KEEP_BYTES = 16 << 20
"""Most bytes of clients' data kept for a later round: three rounds' worth, so that the bound is
reached at once. By default 128 MiB, which a hundred registered clients would never fill."""

UPDATES = (10, 50, 100)
NUMBERS = 4_000_000
"""Numbers in the state of the clients that do nothing: 16 MB, about a MobileNet."""


class Made(Population):
    """Clients whose data follow from their names; the time when the first is opened is kept."""

    shape = SHAPE
    classes = CLASSES

    def __init__(self, seen: int) -> None:
        self.seen, self.unseen = NumberedNames("client-", range(seen)), ()
        self.opened = 0
        self.first: float | None = None

    def open(self, name: str) -> ClientData:
        self.first = self.first or time.perf_counter()
        self.opened += 1
        source = generator("benchmark of scale", name)
        labels = torch.randint(CLASSES, (TRAIN + VALIDATION,), generator=source)
        images = torch.randn(TRAIN + VALIDATION, *SHAPE, generator=source)
        images += labels[:, None, None, None] / CLASSES
        return ClientData(
            Examples(images[:TRAIN], labels[:TRAIN]), Examples(images[TRAIN:], labels[TRAIN:])
        )


def peak() -> float:
    """Return the peak resident memory of this process, in MB."""
    # Not that of getrusage: a new process inherits it from the one that started it.
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1e3


def measure(registered: int, rounds: int, learn: int) -> dict[str, Any]:
    """Return start-up, the seconds of every round but the first, and peak memory."""
    population = Made(registered)
    model = models.build("fedl2p.models:small_conv", shape=SHAPE, classes=CLASSES, seed=0)
    settings = Settings(local=LocalTraining(rate=0.05), finetune=InnerLoop(epochs=5))
    out: dict[str, Any] = {}
    for name, count in (("fedavg", rounds), ("fedl2p", learn)):
        if not count:
            continue
        method = methods.build(name, settings)
        population.first = None
        began = time.perf_counter()
        node = ClientNode(
            build=functools.partial(copy.deepcopy, model),
            population=population,
            methods={method.name: method},
            simulated=True,
            keep_bytes=KEEP_BYTES,
        )
        done = federate(
            method,
            model,
            population,
            rounds=Rounds(rounds=count + 1, clients_per_round=COHORT, keep="last"),
            seed=0,
            stage="learn",
            clients=InProcess(node),
        )
        if any(record.failures for record in done.records):
            raise RuntimeError(f"clients failed: {done.records}")
        assert population.first is not None
        out[name] = {
            "start": population.first - began,
            "rounds": [record.seconds for record in done.records[1 : count + 1]],
            "peak": peak(),
        }
    return out


@dataclass(frozen=True, kw_only=True)
class Moved(Method):
    """Every client answers the state plus one."""

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        return {f"part{i}": torch.zeros(NUMBERS // 10) for i in range(10)}

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        return [
            Update(c.name, {k: t + 1 for k, t in state.items()}, weight=1.0, metrics={"loss": 1.0})
            for c in clients
        ]

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        return [Update(c.name, weight=1.0, metrics={"loss": 1.0}) for c in clients]

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        raise NotImplementedError


def measure_updates(clients: int) -> dict[str, Any]:
    """Return peak memory and the seconds of a round of large updates."""
    method, model, population = Moved(name="moved"), nn.Linear(1, 1), Made(clients)
    node = ClientNode(
        build=lambda: with_compute(model, Compute(stack_size=1)),
        population=population,
        methods={method.name: method},
        keep_bytes=0,
        simulated=True,
    )
    done = federate(
        *(method, model, population),
        rounds=Rounds(rounds=2, keep="last"),
        seed=0,
        stage="learn",
        clients=InProcess(node),
    )
    return {"peak": peak(), "rounds": [record.seconds for record in done.records[:2]]}


def alone(*arguments: str) -> dict[str, Any]:
    """Run this file in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def numbers(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Return start-up, seconds per round and peak memory of both methods, each by its median."""
    out = []
    for name in ("fedavg", "fedl2p"):
        out.append(statistics.median(run[name]["start"] for run in runs))
        out.append(statistics.median(s for run in runs for s in run[name]["rounds"]))
        out.append(statistics.median(run[name]["peak"] for run in runs))
    return out


def registered_table(runs: dict[int, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| registered | FedAvg: start, s | round, s | peak, MB "
        "| FedL2P: start, s | round, s | peak, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    first = numbers(runs[REGISTERED[0]])
    for registered, own in runs.items():
        values = numbers(own)
        cells = [
            f"{value:.{digits}f} ({value / base:.2f} x)"
            for value, base, digits in zip(values, first, (3, 2, 0, 3, 2, 0), strict=True)
        ]
        lines.append(f"| {registered:,} | {' | '.join(cells)} |")
    return lines


def updates_table(runs: dict[int, dict[str, Any]]) -> list[str]:
    lines = ["| clients per round | peak, MB | round, s |", "|---|---|---|"]
    for clients, run in runs.items():
        lines.append(f"| {clients} | {run['peak']:.0f} | {statistics.median(run['rounds']):.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--learn", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(measure(args.measure, args.rounds, args.learn)))
        return
    if args.updates:
        print(json.dumps(measure_updates(args.updates)))
        return
    load = os.getloadavg()[0]
    counts = (f"--rounds={args.rounds}", f"--learn={args.learn}")
    runs: dict[int, list[dict[str, Any]]] = {registered: [] for registered in REGISTERED}
    for _ in range(args.repeats):
        for registered, own in runs.items():
            own.append(alone(f"--measure={registered}", *counts))
    updates = {clients: alone(f"--updates={clients}") for clients in UPDATES}
    text = "\n".join(
        [
            "# Registered clients, and updates in memory",
            "",
            f"{COHORT} clients per round of so many registered ones; {TRAIN} training and "
            f"{VALIDATION} validation images of {' x '.join(map(str, SHAPE))} per client, made "
            f"when it is opened, and kept up to {KEEP_BYTES >> 20} MiB in all; the net is "
            f"`fedl2p.models:small_conv`. {args.repeats} processes per row, in turns; in each "
            f"{args.rounds} rounds of FedAvg and {args.learn} of FedL2P's "
            "learning after one that warms up. Start: from making the nodes, with the package "
            "imported, to the first client's data. Medians; in brackets, relative to the first "
            "row. The peak is that of the process's resident memory, with Python and torch. "
            f"One thread. Load of the machine before the start: {load:.1f}.",
            "",
            *registered_table(runs),
            "",
            f"Updates of {NUMBERS * 4 / 1e6:.0f} MB from clients that do nothing, one per call of "
            "the method. The mean is a running sum in float64.",
            "",
            *updates_table(updates),
            "",
            "Written by `python benchmarks/scale.py"
            + ("".join(f" {a}" for a in sys.argv[1:]) + "`."),
        ]
    )
    print(text)
    RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
