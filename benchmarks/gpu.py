"""Inner steps on a GPU: clients per second, every way of running a cohort, from one run.

The floor is plain PyTorch, one client after another, eager: K steps of the network with
``torch.nn.BatchNorm2d`` and ``torch.optim.SGD`` on batches that are on the device already. Ours
does the same K steps with mixed norms, in every way there is: clients one after another, in
bfloat16 with channels last, stacked (vmap), and side by side on streams. Plain steps recorded as a
CUDA graph, and replayed, show what calls from Python cost.

    python benchmarks/gpu.py                            # ResNet-18 at CIFAR shape, batch 32, K = 10
    python benchmarks/gpu.py --net small-8 --cohorts 10 25 100 400
    python benchmarks/gpu.py --device cpu --net small-8 --cohorts 1 4 --steps 5   # to try it

Arithmetic is that of torch's own counter for a plain step. The peak is that of a large product of
matrices in the same run, in TF32, which is what torch's convolutions of float32 compute in, and in
bfloat16. Memory is the most that the device held at a time, beyond what lay there before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import speed
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import Compute
from fedl2p.core.working_copies import working_copies

STREAMS = 4

Work = Callable[[], object]


def batches(case: speed.Case, clients: int, steps: int, device: str) -> list[StackBatch]:
    """Return the batches of a stack, on the device."""
    drawn = []
    for k in range(steps):
        parts = [speed.examples(case, speed.BATCH, 1000 * k + c) for c in range(clients)]
        x, y = torch.stack([e.x for e in parts]), torch.stack([e.y for e in parts])
        drawn.append(StackBatch(x.to(device), y.to(device)))
    return drawn


def alone(parts: Sequence[StackBatch], client: int) -> list[StackBatch]:
    return [StackBatch(p.x[client : client + 1], p.y[client : client + 1]) for p in parts]


def tuning(net: FunctionalModel, clients: int) -> Callable[[Sequence[StackBatch]], None]:
    """Return what fine-tunes as many clients at a time."""
    one = Hyperparams.constant(net.sites, mix=0.5, rate=1e-3)
    hyper = Hyperparams.stack([one] * clients).to(net.device, net.dtype)

    def tune(parts: Sequence[StackBatch]) -> None:
        with InPlaceSGD(net, net.start(clients), hyper.mix, hyper.rate) as sgd:
            for batch in parts:
                sgd.step(batch)

    return tune


def ways(case: speed.Case, clients: int, steps: int, device: str) -> dict[str, Work]:
    """Return every way to fine-tune a cohort, the floor first."""
    parts = batches(case, clients, steps, device)
    own = [alone(parts, c) for c in range(clients)]
    plain = [[(p.x[0], p.y[0]) for p in mine] for mine in own]
    trained = case.build(case.shape, 10).to(device)
    model = case.build(case.shape, 10).to(device)
    cuda = device == "cuda"
    fast = Compute(precision="bfloat16", channels_last=True)
    nets = {"": Compute(), ", bfloat16, channels last": fast}
    made: dict[str, Work] = {"plain, eager": lambda: [speed.plain(trained, b) for b in plain]}
    if cuda:
        made["plain, CUDA graph"] = recorded(case, clients, steps)
    for name, compute in nets.items():
        noted = with_compute(model, compute)
        net = working_copies(noted).net
        made[f"one after another{name}"] = _loop(noted, net, own)
        if clients > 1 and net.stackable(parts[0].x[0]):
            made[f"stacked{name}"] = _stacked(noted, net, clients, parts)
        if clients > 1 and cuda:
            made[f"{STREAMS} streams{name}"] = _streams(noted, net, own)
    return made


def recorded(case: speed.Case, clients: int, steps: int) -> Work:
    """Return plain steps that are replayed from a CUDA graph, all on one batch."""
    model = case.build(case.shape, 10).to("cuda").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    example = speed.examples(case, speed.BATCH, 0).to("cuda")

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(example.x), example.y).backward()
        optimizer.step()

    # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step()

    def work() -> object:
        for _ in range(clients * steps):
            graph.replay()
        return step  # it holds the batch, which lies where the graph reads it

    return work


def _loop(model: nn.Module, net: FunctionalModel, own: Sequence[Sequence[StackBatch]]) -> Work:
    tune = tuning(net, 1)
    # the model is held here: its net lives as long as it does
    return lambda: [(model, tune(mine)) for mine in own]


def _stacked(
    model: nn.Module, net: FunctionalModel, clients: int, parts: Sequence[StackBatch]
) -> Work:
    tune = tuning(net, clients)
    return lambda: (model, tune(parts))


def _streams(model: nn.Module, net: FunctionalModel, own: Sequence[Sequence[StackBatch]]) -> Work:
    tune = tuning(net, 1)
    pool = ThreadPoolExecutor(STREAMS)
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]

    def several(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            for mine in own[i::STREAMS]:
                tune(mine)

    def work() -> object:
        now = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(now)
        done = list(pool.map(several, range(STREAMS)))
        for stream in streams:
            now.wait_stream(stream)
        return model, done

    return work


def flops(case: speed.Case, device: str) -> int:
    """Return the operations of a plain step."""
    model = case.build(case.shape, 10).to(device)
    example = speed.examples(case, speed.BATCH, 0)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(example.x.to(device)), example.y.to(device)).backward()
    return counter.get_total_flops()


def peaks() -> dict[torch.dtype, float]:
    """Return the operations per second of products of 8192 x 8192 matrices, TF32 and bfloat16."""
    found = {}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        took = seconds({"": lambda a=a, b=b: [a @ b for _ in range(10)]}, 5, "cuda")[""]
        found[dtype] = 10 * 2 * 8192**3 / took
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def memory(work: Work) -> float:
    """Return the MiB that a work needs on the GPU, beyond what lies there already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds(works: dict[str, Work], repeats: int, device: str) -> dict[str, float]:
    """Return the median seconds of each, taken in turns after a warm-up."""
    wait = torch.cuda.synchronize if device == "cuda" else nullcontext
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            wait()
            began = time.perf_counter()
            work()
            wait()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(own) for name, own in times.items()}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--net", default="resnet18", choices=list(speed.CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu tries the script")
    case = speed.CASES[options.net]
    each = flops(case, options.device) * options.steps
    peak = peaks() if cuda else {}
    name = torch.cuda.get_device_name() if cuda else "CPU"
    said = "".join(f", {rate / 1e12:.0f} TFLOP/s in {dtype}" for dtype, rate in peak.items())
    said = f" (products of matrices{said})" if cuda else ""
    lines = [
        "# Inner steps on a GPU" if cuda else "# Inner steps",
        "",
        f"{options.net}, batch {speed.BATCH}, K = {options.steps}, on {name}{said}, "
        f"torch {torch.__version__}; median of {options.repeats} repetitions in turns. Written by "
        f"`python {' '.join(['benchmarks/gpu.py', *sys.argv[1:]])}`.",
        "",
        "| clients | how | clients per second | of the floor | TFLOP/s | of the peak | MiB |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for clients in options.cohorts:
        works = ways(case, clients, options.steps, options.device)
        took = seconds(works, options.repeats, options.device)
        for how, own in took.items():
            rate = clients * each / own
            part, most = "", ""
            if cuda:
                dtype = torch.bfloat16 if "bfloat16" in how else torch.float32
                part, most = f"{rate / peak[dtype]:.1%}", f"{memory(works[how]):.0f}"
            lines.append(
                f"| {clients} | {how} | {clients / own:.1f} | {took['plain, eager'] / own:.2f} x "
                f"| {rate / 1e12:.2f} | {part} | {most} |"
            )
            print(lines[-1], flush=True)
        del works
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
