"""How much faster two cores are than one: FedAvg rounds in process and on Ray, in turns.

The small net of `speed.py` on 8 x 8 pixels, 96 training and 32 validation images per client, one
epoch, with validation. Each engine does the same rounds on one core and on two (threads in process,
workers on Ray), one after the other, several times over. One core is one core for everything: this
process, its workers, and Ray's own processes, which would else help one worker from the other core.
Beside the ratio of the wall-clock time stands how many cores the engine then had in fact, since
others may use the machine too, and by how much two cores need more processor time than one; for
threads also how often one waited for another, per update, on two cores: for Python's lock, mostly.
What the machine itself allows is measured too: the rounds that two processes do which know nothing
of each other, over those of one. Memory that is freed is kept, as by the command ``fedl2p``.

    python benchmarks/two_cores.py [--clients 20 100] [--stack-sizes 10 25] [--repeats 7]

Prints a table and writes it to benchmarks/results/two_cores.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from speed import BATCH, CASES, ROUND_EXAMPLES, client

from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.clients.in_process import in_process
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.clients.ray import OnRay
from fedl2p.federation.messages import Clients
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Ray, Rounds
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.methods.fedavg import FedAvg
from fedl2p.process_environment import prepare_process

RESULT = Path(__file__).parent / "results" / "two_cores.md"
CASE = CASES["small-8"]
FEDAVG = FedAvg(name="fedavg", local=LocalTraining(epochs=1, batch_size=BATCH, rate=1e-3))
CLIENT_ROUNDS = 1000  # so many times a client takes part in a turn, whatever their number
SIZE = Compute().stack_size
LOADING = 15  # seconds
CPUS = sorted(os.sched_getaffinity(0))


def population(clients: int) -> InMemory:
    """Return clients with images of noise."""
    return InMemory({f"c{i:03d}": client(CASE, i, ROUND_EXAMPLES).data for i in range(clients)})


def model(stack_size: int) -> torch.nn.Module:
    """Return the net; every process builds the same."""
    torch.manual_seed(0)
    compute = Compute(stacking="always", stack_size=stack_size)
    return with_compute(CASE.build(CASE.shape, 10), compute)


def node(clients: int, stack_size: int) -> ClientNode:
    """Return the node of a worker."""
    build = functools.partial(model, stack_size)
    return ClientNode(build=build, population=population(clients), methods={"fedavg": FEDAVG})


def seconds(
    where: Clients, clients: InMemory, threads: int, stack_size: int
) -> tuple[float, float, int]:
    """Return wall-clock and processor seconds of rounds, and how often a thread here waited.

    The processes that were started are among the processor seconds. One round before warms up.
    """
    count = len(clients.names)
    torch.set_num_threads(threads)
    times = []
    for rounds in (1, CLIENT_ROUNDS // count):
        processor, waited, began = used(), waits(), time.perf_counter()
        federate(
            FEDAVG,
            model(stack_size),
            clients,
            rounds=Rounds(rounds=rounds, clients_per_round=count, keep="last"),
            seed=0,
            stage="pretrain",
            clients=where,
        )
        times.append((time.perf_counter() - began, used() - processor, waits() - waited))
    return times[1]


def keep_to(cores: int) -> None:
    """Keep this process and those that it has started to so many cores, each of their threads."""
    for process in running():
        with contextlib.suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, CPUS[:cores])


def used() -> float:
    """Return the processor seconds of this process and of those that it has started."""
    total = 0.0
    for process in running():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def waits() -> int:
    """Return how often a thread of this process has given its core away to wait."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def running() -> list[psutil.Process]:
    """Return this process and those that it has started."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def measure(engine: str, count: int, stack_size: int, repeats: int) -> str:
    """Return the row of an engine."""
    clients = population(count)
    turns: list[tuple[tuple[float, float, int], tuple[float, float, int]]] = []
    with contextlib.ExitStack() as stack:
        if engine == "in process":
            where = in_process(model(stack_size), clients, {"fedavg": FEDAVG})
            engines: tuple[Clients, Clients] = where, where
        else:
            # both are open at the same time, and Ray counts CPUs whether a worker is idle or not
            one, two = (
                OnRay(
                    functools.partial(node, count, stack_size),
                    clients.names,
                    stack_size=stack_size,
                    resources=Ray(cpus_per_worker=0.5, workers=workers),
                )
                for workers in (1, 2)
            )
            stack.callback(one.close)
            stack.callback(two.close)
            engines = one, two
        for _ in range(1 + repeats):
            keep_to(1)
            one_core = seconds(engines[0], clients, 1, stack_size)
            keep_to(2)
            turns.append((one_core, seconds(engines[1], clients, 2, stack_size)))
    ratios = [one[0] / two[0] for one, two in turns[1:]]
    had = [(two[1] / two[0]) / (one[1] / one[0]) for one, two in turns[1:]]
    more = [two[1] / one[1] for one, two in turns[1:]]
    took = [
        1000 * statistics.median(t[i][0] for t in turns[1:]) * count / CLIENT_ROUNDS
        for i in range(2)
    ]
    waited = statistics.median(two[2] for _, two in turns[1:]) / CLIENT_ROUNDS
    return (
        f"| {engine} | {count} | {stack_size} | {took[0]:.0f} | {took[1]:.0f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {statistics.median(had):.2f} | {statistics.median(more):.2f} "
        f"| {'' if engine == 'ray' else format(waited, '.0f')} |"
    )


def apart(count: int, repeats: int) -> str:
    """Return what two processes apart do in the time of one."""
    ratios = []
    for _ in range(repeats):
        took = []
        for processes in (1, 2):
            start = str(time.time() + LOADING)  # when all have loaded
            command = [sys.executable, __file__, "--from", start, "--clients", str(count)]
            started = [
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                for _ in range(processes)
            ]
            took.append(max(float(process.communicate()[0]) for process in started))
        ratios.append(2 * took[0] / took[1])
    return (
        f"Two processes that know nothing of each other, one thread and {count} clients each, do "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times the "
        f"rounds of one in the same time; {repeats} turns."
    )


def rounds_from(start: float, count: int) -> float:
    """Return how many seconds this process takes for its rounds, from a moment on."""
    clients = population(count)
    where = in_process(model(SIZE), clients, {"fedavg": FEDAVG})
    if time.time() > start:
        raise RuntimeError("loading took longer than was planned; try again")
    time.sleep(start - time.time())
    return seconds(where, clients, 1, SIZE)[0]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--stack-sizes", type=int, nargs="+", default=[SIZE])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--from", type=float, dest="start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(rounds_from(options.start, options.clients[0]))
        return
    prepare_process()
    lines = [
        "# Two cores against one",
        "",
        f"FedAvg with validation, {CLIENT_ROUNDS} updates per turn, medians of "
        f"{options.repeats} turns; "
        f"{os.cpu_count()} CPUs; load of the machine before the start {os.getloadavg()[0]:.1f}. "
        "Cores had: processor time per second with two, over the same with one. Written by "
        f"`python {' '.join(sys.argv)}`.",
        "",
        "| engine | clients | clients of a stack | round on one core, ms | on two, ms "
        "| times as fast (least to most) | cores had | processor time, ratio "
        "| waits of threads per update |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for engine in ("in process", "ray"):
        for count in options.clients:
            for stack_size in options.stack_sizes:
                if stack_size < count:  # else there is one stack, on one core
                    lines.append(measure(engine, count, stack_size, options.repeats))
                    print(lines[-1], flush=True)
    lines += ["", apart(options.clients[0], min(3, options.repeats))]
    print(lines[-1])
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
