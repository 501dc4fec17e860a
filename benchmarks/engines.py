"""What an engine costs per client task: in process against Ray's workers, side by side in one run.

Clients whose method does nothing: they send back what they received, so that all the time is the
engine's, the wire's and the server's (messages, encoding, checks, average). The engines take turns,
several times over, so that whatever else the machine does falls on all of them alike:

    python benchmarks/engines.py [--clients 50] [--rounds 4] [--repeats 5]

Prints a table and writes it to benchmarks/results/engines.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.clients.ray import OnRay, available_cpus
from fedl2p.federation.messages import Clients
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Ray, Rounds
from fedl2p.method import Client, Method, Outcome, State, Update

RESULT = Path(__file__).parent / "results" / "engines.md"
SIZES = (10_000, 1_000_000)
"""Numbers in the state that travels: about those of meta-nets, and of a small network."""


@dataclass(frozen=True, kw_only=True)
class Idle(Method):
    """Every client answers what it was sent."""

    size: int

    @classmethod
    def of(cls, size: int) -> Idle:
        return cls(name=f"idle-{size}", size=size)

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        return {f"part{i}": torch.zeros(self.size // 10) for i in range(10)}

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        metrics = {"loss": 1.0, "accuracy": 0.5}
        return [Update(c.name, state, weight=1.0, metrics=metrics) for c in clients]

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        raise NotImplementedError


def population(clients: int) -> InMemory:
    data = ClientData(Examples(torch.zeros(2, 4), torch.tensor([0, 1])))
    return InMemory({f"client-{i:04d}": data for i in range(clients)})


def node(clients: int, *, stack_size: int, keep_bytes: int | None = None) -> ClientNode:
    methods = [Idle.of(size) for size in SIZES]
    return ClientNode(
        build=lambda: with_compute(nn.Linear(4, 2), Compute(stack_size=stack_size)),
        population=population(clients),
        methods={method.name: method for method in methods},
        keep_bytes=keep_bytes,
    )


def here(clients: int, *, encoded: bool = False) -> Clients:
    """Return clients in this process, one per call of the method."""
    alone = InProcess(node(clients, stack_size=1, keep_bytes=0))
    if not encoded:
        return alone
    from fedl2p.federation.flower.encoded import Encoded  # only here: a GPU's machine may lack flwr

    return Encoded(alone)


def at_once(clients: int) -> Clients:
    return InProcess(node(clients, stack_size=10))


def on_ray(clients: int, *, stack_size: int) -> Clients:
    # Two such engines are open at the same time, and Ray counts CPUs whether a worker is idle or
    # not.
    resources = Ray(cpus_per_worker=0.5, workers=available_cpus())
    make = functools.partial(node, clients, stack_size=stack_size)
    return OnRay(make, population(clients).names, stack_size=stack_size, resources=resources)


ENGINES: dict[str, Callable[[int], Clients]] = {
    "in process, all clients in one call": at_once,
    "in process, one client per call": here,
    "in process, one client per call, encoded": functools.partial(here, encoded=True),
    "ray, 10 clients per task": functools.partial(on_ray, stack_size=10),
    "ray, one client per task": functools.partial(on_ray, stack_size=1),
}


def milliseconds(where: Clients, clients: int, size: int, rounds: int) -> list[float]:
    """Return the time per client task of each round, but for the first, which warms up."""
    done = federate(
        Idle.of(size),
        nn.Linear(4, 2),
        population(clients),
        rounds=Rounds(rounds=rounds + 1, keep="last"),
        seed=0,
        stage="learn",
        clients=where,
    )
    if any(record.failures for record in done.records):
        raise RuntimeError(f"clients failed: {done.records}")
    return [1000 * r.seconds / r.clients for r in done.records[1 : rounds + 1]]


def measure(clients: int, rounds: int, repeats: int) -> tuple[dict[str, list[list[float]]], float]:
    """Return milliseconds per task by engine and size, and the seconds until Ray has workers."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in SIZES] for name in ENGINES}
    with contextlib.ExitStack() as stack:
        opened = {name: make(clients) for name, make in ENGINES.items()}
        seconds = []
        for where in opened.values():
            stack.callback(where.close)
            began = time.perf_counter()
            milliseconds(where, clients, SIZES[0], 0)
            seconds.append(time.perf_counter() - began)
        for _ in range(repeats):
            for name, where in opened.items():
                for place, size in enumerate(SIZES):
                    times[name][place] += milliseconds(where, clients, size, rounds)
    return times, max(seconds)  # the first on Ray starts it


def cell(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def page(times: dict[str, list[list[float]]], ready: float, said: str, load: str) -> str:
    """Return the whole page."""
    lines = [
        "# Overhead per client task",
        "",
        said,
        "",
        "| engine | " + " | ".join(f"{size:,} numbers, ms" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
        *(f"| {name} | {' | '.join(map(cell, own))} |" for name, own in times.items()),
        "",
        f"Until Ray and its first workers answered: {ready:.1f} s, once per study. {load}",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    before = os.getloadavg()[0]
    times, ready = measure(args.clients, args.rounds, args.repeats)
    said = (
        f"Median (smallest to largest) of {args.repeats} times {args.rounds} rounds of "
        f"{args.clients} clients that do nothing; {available_cpus()} CPUs, as many workers. The "
        "engines took turns. Written by `python benchmarks/engines.py`."
    )
    load = f"Load of the machine before the start: {before:.1f}."
    text = page(times, ready, said, load)
    print(text, end="")
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
