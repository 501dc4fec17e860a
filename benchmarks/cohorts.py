"""Where stacking clients pays on a CPU: time per client by stack size, and what the rule takes.

For every network, clients of one inner loop (K steps, batch 32, mixed norms) are cut into stacks of
1 to 40 (``fedl2p.core.finetuning.stacking``); one thread per stack, as the rule runs small models.
The smallest time per client is what a rule could reach.

    python benchmarks/cohorts.py            # prints and writes benchmarks/results/cohorts.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import speed
import torch
from torch import nn

from fedl2p.core.clientdata import ClientData
from fedl2p.core.finetuning.inner_loop import inner_batches, run_inner_loop
from fedl2p.core.finetuning.stacking import cut_into_stacks, map_stacks
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.models import load

RESULT = Path(__file__).parent / "results" / "cohorts.md"
SIZES = (1, 2, 3, 5, 10, 20, 40)


@dataclass(frozen=True)
class Kind:
    """A network, the shape of its inputs, and how many clients are timed."""

    model: str
    shape: tuple[int, ...]
    clients: int = 40


KINDS = {
    "small_conv, 1 x 8 x 8": Kind("small_conv", (1, 8, 8)),
    "small_conv, 3 x 16 x 16": Kind("small_conv", (3, 16, 16)),
    "small_conv, 3 x 32 x 32": Kind("small_conv", (3, 32, 32), clients=20),
    "small_mel, 1 x 49 x 40": Kind("small_mel", (1, 49, 40), clients=20),
    "small_conv, 3 x 96 x 96": Kind("small_conv", (3, 96, 96), clients=5),
    "resnet18_cifar, 3 x 32 x 32": Kind("resnet18_cifar", (3, 32, 32), clients=2),
}


def milliseconds(
    net: FunctionalModel, data: Sequence[ClientData], size: int | None, steps: int
) -> float:
    """Return the time per client and step, in stacks of ``size``, or as the rule cuts them."""
    inner = InnerLoop(epochs=steps, batch_size=speed.BATCH)
    one = Hyperparams.constant(net.sites, mix=0.5, rate=1e-3)

    def work(members: list[int]) -> list[None]:
        hyper = Hyperparams.stack([one] * len(members)).to(net.device, net.dtype)
        batches = inner_batches(net, [data[i] for i in members], members, inner)
        run_inner_loop(net, hyper, batches, statistics="corrected")
        return [None] * len(members)

    began = time.perf_counter()
    if size is None:
        map_stacks(work, net, data, range(len(data)))
    else:
        for begin in range(0, len(data), size):
            work(list(range(begin, min(begin + size, len(data)))))
    return 1000 * (time.perf_counter() - began) / len(data) / steps


def row(name: str, kind: Kind, repeats: int, steps: int) -> str:
    """Measure a network in all sizes, in turns, and return its row."""
    torch.manual_seed(0)
    model: nn.Module = load(f"fedl2p.models:{kind.model}", shape=kind.shape, classes=10)
    net = working_copies(model).net
    case = speed.Case(lambda shape, classes: model, kind.shape, steps=steps)
    data = [ClientData(speed.examples(case, speed.BATCH, i)) for i in range(kind.clients)]
    sizes = [s for s in SIZES if s <= kind.clients]
    times: dict[int | None, list[float]] = {s: [] for s in (*sizes, None)}
    for repeat in range(repeats + 1):
        for size, own in times.items():
            took = milliseconds(net, data, size, steps)
            if repeat:
                own.append(took)
    medians = {s: statistics.median(own) for s, own in times.items()}
    chosen = len(next(iter(cut_into_stacks(net, data))))
    cells = [f"{medians[s]:.2f}" if s in medians else "" for s in SIZES]
    best = min(medians[s] for s in sizes)
    return f"| {name} | {' | '.join(cells)} | {chosen} | {medians[None] / best:.2f} |"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Stacks of clients",
        "",
        f"Milliseconds per client and inner step, batch {speed.BATCH}, by clients per stack, on "
        f"one thread; median of {options.repeats} repetitions in turns. Then the size that the rule"
        " takes (`fedl2p.core.finetuning.stacking`), and its time over the best of the row. "
        "Load of the machine "
        f"at the start: {os.getloadavg()[0]:.1f}. Written by `python benchmarks/cohorts.py`.",
        "",
        f"| network | {' | '.join(map(str, SIZES))} | rule | its time, of the best |",
        f"|---|{'---:|' * (len(SIZES) + 2)}",
    ]
    for name, kind in KINDS.items():
        lines.append(row(name, kind, options.repeats, options.steps))
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
