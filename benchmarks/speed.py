"""What everything costs, in plain training steps: floor, ours, ratio and peak memory, from one run.

The floor of every row is plain PyTorch: the same network with ``torch.nn.BatchNorm2d`` and
``torch.optim.SGD`` on batches that are already in memory, one client after another, on as many
threads as ours. It is measured in the same run, in turns with ours, and multiplied by the number of
plain steps that the row needs at the least (column "steps"): a step is a forward and a backward
pass, which counts as three forward passes; a step that is differentiated again costs two more
(a backward pass through forward and backward). So a ratio says the same on any machine.

    python benchmarks/speed.py                        # small nets in full, ResNet-18 shortened
    python benchmarks/speed.py --nets small-8 --repeats 9
    python benchmarks/speed.py --rows FedAvg alone    # prints these rows, writes no table

Peak memory is what a process of its own needs beyond what it had with everything loaded; it is
taken for ours and for the floor (no ratio where the floor needs less than 20 MiB). Times are
medians after a warm-up, and so are ratios, of ours to the floor next to it: of processor seconds
with one thread, which tell the same on a machine that others use too, of wall-clock seconds with
several.

Memory that is freed is kept in this process, as in those of the command ``fedl2p``, for ours and
for the floor (:mod:`fedl2p.process_environment`).

The floor of a FedAvg round is that round: for each client the global weights are loaded, an epoch
is trained and the weights are added up. It does not validate, where a row does not say so; ours
does.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import engines
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD
from fedl2p.core.finetuning.inner_loop import inner_batches
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.hypergradients.estimators import stack_hypergradient
from fedl2p.core.hypergradients.problem import Problem
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import MODES, Compute, HypergradientConfig, InnerLoop, Mode
from fedl2p.core.working_copies import working_copies
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.clients.in_process import in_process
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.method import Client
from fedl2p.methods.base.settings import LocalTraining, MetaLearning
from fedl2p.methods.fedavg import FedAvg
from fedl2p.methods.fedl2p import FedL2P
from fedl2p.models import resnet18_cifar, small_conv
from fedl2p.process_environment import prepare_process

BATCH = 32
ROUND_EXAMPLES = 96
"""Of a client in a FedAvg round, in which it takes one epoch."""
SECONDS = 10.0
"""How long a row is repeated at least: short ones often, since a machine's pace changes."""
RESULT = Path(__file__).parent / "results" / "speed.md"


@dataclass(frozen=True)
class Case:
    """A network and how much of the work is done with it.

    Parameters
    ----------
    steps
        K of a single hypergradient.
    examples, epochs, outer
        Of a client round: training examples, passes over them, outer steps.
    clients
        Of a round of many clients; 0 leaves those rows out.
    sizes
        Fewest and most training examples of clients that differ; of as many of them another round.
    unequal_sizes
        How many they are; 0 leaves that row out.
    fedavg
        Clients of rounds of FedAvg.
    modes
        Estimators of the hypergradient to measure.
    """

    build: Callable[[Sequence[int], int], nn.Module]
    shape: tuple[int, ...]
    steps: int
    examples: int = 45
    epochs: int = 15
    outer: int = 3
    clients: int = 0
    sizes: tuple[int, int] = (20, 120)
    unequal_sizes: int = 0
    fedavg: tuple[int, ...] = ()
    modes: tuple[Mode, ...] = MODES

    @property
    def batches(self) -> int:
        return math.ceil(self.examples / BATCH)


CASES = {
    "small-8": Case(
        small_conv, (1, 8, 8), steps=15, clients=100, unequal_sizes=40, fedavg=(20, 100)
    ),
    "small-16": Case(small_conv, (3, 16, 16), steps=15, clients=20, fedavg=(20,)),
    # two passes instead of 15, one outer step instead of 3, fewer modes: a step takes a second
    "resnet18": Case(
        resnet18_cifar,
        (3, 32, 32),
        steps=4,
        epochs=2,
        outer=1,
        modes=("last-step", "trajectory", "truncated", "unrolled"),
    ),
}

COMPUTE = {
    "channels last": Compute(channels_last=True),
    "bfloat16": Compute(precision="bfloat16"),
    "bfloat16, channels last": Compute(precision="bfloat16", channels_last=True),
}
"""Other ways to compute, for large models."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What is measured: ours, and the floor's plain training of ``floor_steps`` steps.

    ``steps`` is the number of plain steps, of the floor's mean length, that ours needs at least.
    """

    name: str
    ours: Work
    floor: Work
    floor_steps: int
    steps: float


def settings(case: Case, mode: Mode = "truncated") -> MetaLearning:
    """Return the default outer loop with the case's number of outer steps."""
    base = MetaLearning()
    return replace(
        base,
        outer_steps=case.outer,
        hypergradient=HypergradientConfig(mode=mode),
    )


def extra(mode: Mode, steps: int) -> float:
    """Return the plain steps that a hypergradient needs at least beside its K inner steps.

    The validation loss forward and backward is one; each differentiated inner step, or product with
    the second derivatives of one, is two. The graph of a batch's gradient is one.
    """
    config = HypergradientConfig()
    return {
        "last-step": 1.0,
        "trajectory": 1.0 + 1 + 2,
        "implicit": 1.0 + 1 + 2 * config.iterations + 2,
        "published": 1.0 + 1 + 2 * config.terms + 1 + 2,
        "truncated": 1.0 + 2 * min(config.steps, steps),
        "unrolled": 1.0 + 2 * steps,
    }[mode]


def round_steps(case: Case, mode: Mode, examples: int) -> float:
    """Return the plain steps that a client round needs at least, and its profile."""
    batches = math.ceil(examples / BATCH)
    loop = case.epochs * batches
    # a step of plain training on a part of a batch takes a part of the time, so that the floor's
    # mean step is the unit; the profile is a forward pass over the data
    return case.outer * (loop + extra(mode, loop)) + batches / 3


def examples(case: Case, count: int, seed: int) -> Examples:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *case.shape, generator=rng)
    return Examples(x, torch.randint(0, 10, (count,), generator=rng))


def client(case: Case, seed: int, count: int | None = None) -> Client:
    train, validation, test = (
        examples(case, n, 10 * seed + i)
        for i, n in enumerate((count or case.examples, BATCH, BATCH))
    )
    return Client(f"c{seed:03d}", ClientData(train, validation, test), seed=seed)


def plain(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Train as everybody does: the floor."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def judge(model: nn.Module, people: Sequence[Client]) -> None:
    """Evaluate the received model on every client's validation part, as ours does."""
    model.eval()
    with torch.no_grad():
        for client in people:
            part = client.data.validation
            assert part is not None
            logits = model(part.x)
            F.cross_entropy(logits, part.y).item()
            (logits.argmax(1) == part.y).float().mean().item()


def fedavg_round(model: nn.Module, trained: nn.Module, people: Sequence[Client]) -> None:
    """One round of FedAvg as everybody writes it: the floor of ours."""
    received = model.state_dict()
    total = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in received.items()}
    for client in people:
        trained.load_state_dict(received)
        train = client.data.train
        batches = [
            (train.x[rows], train.y[rows]) for rows in torch.randperm(train.num).split(BATCH)
        ]
        plain(trained, batches)
        for k, v in trained.state_dict().items():
            total[k] += v * (train.num / (ROUND_EXAMPLES * len(people)))
    model.load_state_dict({k: v.to(received[k].dtype) for k, v in total.items()})


def rows_of(case: Case) -> list[Row]:
    """Return the rows of a network; those with many clients last."""
    torch.manual_seed(0)
    model = case.build(case.shape, 10)
    trained = case.build(case.shape, 10)
    net = working_copies(model).net
    sites = net.sites
    hyper = Hyperparams.stack([Hyperparams.constant(sites, mix=0.5, rate=1e-3)])
    full = [examples(case, BATCH, 100 + k) for k in range(case.steps)]
    stacked = [(e.x[None], e.y[None]) for e in full]
    validation = [StackBatch(full[0].x[None], full[0].y[None])]
    pairs = [(e.x, e.y) for e in full]

    def steps(own: FunctionalModel) -> None:
        with InPlaceSGD(own, own.start(1), hyper.mix, hyper.rate) as sgd:
            for x, y in stacked:
                sgd.step(StackBatch(x, y))

    def gradient(mode: Mode, segment: int | None = None) -> Work:
        config = HypergradientConfig(mode=mode, segment=segment)
        problem = Problem(
            net=net,
            mix=hyper.mix,
            rate=hyper.rate,
            batches=stacked,
            validation=validation,
            following=stacked[0],
        )
        return lambda: stack_hypergradient(problem, config)

    floor = len(pairs)
    ways = {"": net}
    if not net.small:
        for name, compute in COMPUTE.items():
            ways[f", {name}"] = FunctionalModel(with_compute(model, compute))
    rows = [
        Row(
            f"one inner step{name}",
            functools.partial(steps, own),
            lambda: plain(trained, pairs),
            floor,
            floor,
        )
        for name, own in ways.items()
    ]
    rows += [
        Row(
            f"hypergradient, {mode}, K = {case.steps}",
            gradient(mode),
            lambda: plain(trained, pairs),
            floor,
            case.steps + extra(mode, case.steps),
        )
        for mode in case.modes
    ]
    if not net.small:
        rows.append(
            Row(
                f"hypergradient, truncated, K = {case.steps}, all graphs held",
                gradient("truncated", segment=case.steps),
                lambda: plain(trained, pairs),
                floor,
                case.steps + extra("truncated", case.steps),
            )
        )
    inner = InnerLoop(epochs=case.epochs, batch_size=BATCH)
    one = client(case, 0)
    loop = case.epochs * case.batches
    drawn = inner_batches(net, [one.data], [0], inner)
    own = [(x[0], y[0]) for x, y in drawn]

    def round_of(mode: Mode, people: Sequence[Client]) -> Work:
        method = FedL2P(name="fedl2p", meta=settings(case, mode), inner=inner)
        state = method.start(model, seed=0)
        return lambda: method.train(model, state, people)

    def floor_of(count: int) -> Work:
        return lambda: [plain(trained, own) for _ in range(count)]

    for mode in ("last-step", "truncated"):
        rows.append(
            Row(
                f"client round, {mode}: {case.outer} x ({case.epochs} epochs of {case.examples})",
                round_of(mode, [one]),
                floor_of(1),
                loop,
                # a batch of the round is 45 / 2 examples on average, the validation batch 32
                round_steps(case, mode, case.examples),
            )
        )
    tuned = FedL2P(name="fedl2p", meta=settings(case), inner=inner)
    initial = tuned.start(model, seed=0)
    rows.append(
        Row(
            f"personalizing a client: {case.epochs} epochs of {case.examples}",
            lambda: tuned.personalize(model, initial, [one]),
            floor_of(1),
            loop,
            loop + (case.batches + 2) / 3,  # the profile, and the test part before and after
        )
    )
    fedavg = FedAvg(name="fedavg", local=LocalTraining(epochs=1, batch_size=BATCH, rate=1e-3))
    received = fedavg.start(model)
    averaged = copy.deepcopy(model)
    epoch = ROUND_EXAMPLES // BATCH
    lone = client(case, 1, ROUND_EXAMPLES)
    rows.append(
        Row(
            "a client's FedAvg round, alone, with validation",
            lambda: fedavg.train(model, received, [lone]),
            lambda: fedavg_round(averaged, trained, [lone]),
            epoch,
            epoch,
        )
    )
    rows.append(
        Row(
            "the same, against a floor that validates too",
            lambda: fedavg.train(model, received, [lone]),
            lambda: (judge(averaged, [lone]), fedavg_round(averaged, trained, [lone])),
            epoch,
            epoch,
        )
    )
    for count in case.fedavg:
        crowd = {f"c{i:03d}": client(case, i, ROUND_EXAMPLES).data for i in range(count)}
        several = [Client(name, data, seed=0) for name, data in crowd.items()]
        population = InMemory(crowd)
        where = in_process(model, population, {"fedavg": fedavg})
        some = Rounds(rounds=4, clients_per_round=count, keep="last")
        rows.append(
            Row(
                f"FedAvg, {some.rounds} rounds of {count} clients and their validation",
                lambda p=population, w=where, r=some: federate(
                    fedavg, model, p, rounds=r, seed=0, stage="pretrain", clients=w
                ),
                lambda s=several, r=some: [
                    fedavg_round(averaged, trained, s) for _ in range(r.rounds)
                ],
                some.rounds * count * epoch,
                some.rounds * count * epoch,
            )
        )
    if case.clients:
        people = [client(case, i) for i in range(case.clients)]
        few = 4  # the floor is one client after another, so that a few tell what all take
        for mode in ("last-step", "truncated"):
            rows.append(
                Row(
                    f"round of {case.clients} clients, {mode}",
                    round_of(mode, people),
                    floor_of(few),
                    few * loop,
                    case.clients * round_steps(case, mode, case.examples),
                )
            )
    if case.unequal_sizes:
        rng = torch.Generator().manual_seed(1)
        sizes = torch.randint(*case.sizes, (case.unequal_sizes,), generator=rng).tolist()
        uneven = [client(case, i, n) for i, n in enumerate(sizes)]
        few = uneven[:: case.unequal_sizes // 8]
        drawn_few = [
            [(x[0], y[0]) for x, y in inner_batches(net, [c.data], [0], inner)] for c in few
        ]
        low, high = case.sizes
        rows.append(
            Row(
                f"round of {case.unequal_sizes} clients of {low} to {high - 1} examples, truncated",
                round_of("truncated", uneven),
                lambda: [plain(trained, own) for own in drawn_few],
                sum(len(own) for own in drawn_few),
                sum(round_steps(case, "truncated", n) for n in sizes),
            )
        )
    if case.clients > 20:
        rows += [
            Row(
                f"engine, {name}, per client task",
                idle(name),
                floor_of(1),
                loop,
                case.clients * round_steps(case, "truncated", case.examples),
            )
            for name in ("in process", "in process, encoded")
        ]
    return rows


def idle(engine: str) -> Work:
    """Return rounds of clients that do nothing, on an engine; their states are small ones."""
    where = engines.here(100, encoded="encoded" in engine)
    return lambda: engines.milliseconds(where, 100, engines.SIZES[0], rounds=1)


def measured(
    work: Work, floor: Work, repeats: int, seconds: float, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Return the median seconds of both and the median of their ratio, taken in turns.

    At least ``repeats`` times, and until ``seconds`` are over.
    """
    times: list[tuple[float, float]] = []
    end = math.inf
    while len(times) <= repeats or time.perf_counter() < end:
        turn = []
        for do in (work, floor):
            began = clock()
            do()
            turn.append(clock() - began)
        times.append((turn[0], turn[1]))
        if len(times) == 1:  # a warm-up
            end = time.perf_counter() + seconds
    ours, floors = zip(*times[1:], strict=True)
    ratios = [a / b for a, b in times[1:]]
    return statistics.median(ours), statistics.median(floors), statistics.median(ratios)


def memory(net: str, row: int, which: str, threads: int) -> float:
    """Return the MiB that a row, or its floor, needs in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", net, str(row), which, "--threads", str(threads)],
        check=True, capture_output=True, text=True,
        # large blocks go back at once: without this the heap's holes differ from run to run
        env={
            **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"
        },
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def peak(net: str, row: int, which: str, threads: int) -> None:
    """Do a row once and print what it took beyond the start, in MiB."""
    torch.set_num_threads(threads)
    small = small_conv((1, 8, 8), 10)
    plain(small, [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))])  # loads what torch loads late
    chosen = rows_of(CASES[net])[row]
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = _status("VmRSS")
    (chosen.ours if which == "ours" else chosen.floor)()
    print(_status("VmHWM") - before)


def _status(field: str) -> float:
    # not ru_maxrss, which a process inherits from the one that started it
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def report(
    nets: Sequence[str], repeats: int, threads: Sequence[int], parts: Sequence[str] = ()
) -> str:
    """Measure and return the table; with ``parts``, of rows whose names hold one of them."""
    lines = [
        "# Speed",
        "",
        f"torch {torch.__version__} on CPU, {os.cpu_count()} cores, batch {BATCH}; medians of "
        f"{repeats} repetitions or more (1 for ResNet-18 and for many clients) in turns, for "
        f"{SECONDS:.0f} seconds or more after a warm-up, the ratio's own too; "
        f"load of the machine at the start {os.getloadavg()[0]:.1f}. Written by "
        "`python benchmarks/speed.py`, whose first lines say what a floor is. Ratios of a round "
        "of many clients are against one client after another; those of an engine say what part it "
        "is of a client's round, its clients do nothing and send 10,000 numbers.",
        "",
        "| network | threads | what | steps | floor, ms | ours, ms | ratio "
        "| memory, MiB | of floor's |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for net in nets:
        for number in threads:
            torch.set_num_threads(number)
            clock = time.process_time if number == 1 else time.perf_counter
            for i, row in enumerate(rows_of(CASES[net])):
                if parts and not any(part in row.name for part in parts):
                    continue
                many = row.name.startswith(("round of", "FedAvg"))
                task = row.name.startswith("engine")
                if number > 1 and not many:  # a client's own work: one thread says it
                    continue
                often = 1 if net == "resnet18" or many else repeats
                ours, floor, times = measured(row.ours, row.floor, often, SECONDS, clock)
                share = row.floor_steps / row.steps
                least, times = floor / share, times * share
                if row.name.startswith("one inner step"):
                    ours, least = ours / row.floor_steps, least / row.floor_steps
                if task:  # two rounds of 100 clients: engines.milliseconds warms up
                    ours, least, times = ours / 200, least / 100, times / 2
                peaks = [memory(net, i, which, number) for which in ("ours", "floor")]
                of = f"{peaks[0] / peaks[1]:.2f}" if peaks[1] > 20 else ""
                shown = 1.0 if row.name.startswith("one inner step") else row.steps
                shown = row.steps / 100 if task else shown
                ratio = f"{times:.3f}" if task else f"{times:.2f}"
                lines.append(
                    f"| {net} | {number} | {row.name} | {shown:.0f} | {1000 * least:.1f} "
                    f"| {1000 * ours:.1f} | {ratio} | {peaks[0]:.0f} | {of} |"
                )
                print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", default=[], help="parts of the names of rows")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        net, row, which = options.peak
        peak(net, int(row), which, options.threads[0])
        return
    prepare_process()
    text = report(options.nets, options.repeats, options.threads, options.rows)
    out = options.out or (None if options.rows else RESULT)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
