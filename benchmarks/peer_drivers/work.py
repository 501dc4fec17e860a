"""The work that every library does, the plain PyTorch loop that is its floor, and the stopwatch.

Torch and the standard library only: this file is imported in the environment of each library. A
driver gives :func:`serve` two functions, which set up first and hold the stopwatch over the rest:

``rounds(watch, count, number, batch)``
    ``number`` rounds of FedAvg over ``count`` clients from :func:`start`, one epoch each; returns
    the global weights by name, with buffers if the library averages them.
``tune(watch, count, batch)``
    Fine-tune ``count`` clients from :func:`start` for EPOCHS epochs, the test part judged before
    and after; returns the mean over clients of the weights, or each client's test loss afterwards.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE, CLASSES = (1, 8, 8), 10
TRAIN, TEST = 96, 32
"""Examples of a client."""
BATCH, RATE, EPOCHS = 32, 0.05, 5
CLIENTS = 100
"""How many clients there are at most."""

Weights = dict[str, Tensor]


class Net(nn.Module):
    """The small net of ``benchmarks/speed.py``, ``fedl2p.models.small_conv``, without fedl2p."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)))
        return self.head(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Data:
    """A client's examples: images (n, 1, 8, 8) and labels (n,)."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@functools.cache
def client(index: int) -> Data:
    """Return a client: noisy images of ten patterns that all clients share."""
    rng = torch.Generator().manual_seed(10_000)
    patterns = torch.randn(CLASSES, *SHAPE, generator=rng)
    rng.manual_seed(index)
    y = torch.randint(0, CLASSES, (TRAIN + TEST,), generator=rng)
    x = patterns[y] + torch.randn(TRAIN + TEST, *SHAPE, generator=rng)
    return Data(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


def start() -> Net:
    """Return the model that all begin with."""
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, batch: int) -> None:
    """Train as everybody does."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy in evaluation mode."""
    model.eval()
    logits = model(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


@functools.cache
def _resident() -> tuple[Net, Net]:
    return start(), start()


def plain_rounds(watch: Stopwatch, count: int, number: int, batch: int) -> Weights:
    """FedAvg as everybody writes it (``fedavg_round`` of ``benchmarks/speed.py``)."""
    model, trained = _resident()
    model.load_state_dict(start().state_dict())
    people = [client(i) for i in range(count)]
    watch.start()
    for _ in range(number):
        received = model.state_dict()
        total = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in received.items()}
        for one in people:
            trained.load_state_dict(received)
            train(trained, one.x, one.y, epochs=1, batch=batch)
            for k, v in trained.state_dict().items():
                total[k] += v * (TRAIN / (TRAIN * count))
        model.load_state_dict({k: v.to(received[k].dtype) for k, v in total.items()})
    watch.stop()
    return {k: v.clone() for k, v in model.state_dict().items()}


def plain_tune(watch: Stopwatch, count: int, batch: int) -> Weights:
    """Fine-tune one client after another, and judge each before and after."""
    return _mean([weights for weights, _ in _tuned(watch, count, batch)])


def _tuned(watch: Stopwatch, count: int, batch: int) -> list[tuple[Weights, float]]:
    model, trained = _resident()
    received = start().state_dict()
    model.load_state_dict(received)
    people = [client(i) for i in range(count)]
    done = []
    watch.start()
    for one in people:
        trained.load_state_dict(received)
        judge(trained, one.test_x, one.test_y)
        train(trained, one.x, one.y, epochs=EPOCHS, batch=batch)
        loss, _ = judge(trained, one.test_x, one.test_y)
        done.append(({k: v.clone() for k, v in trained.state_dict().items()}, loss))
    watch.stop()
    return done


def mean_of(models: list[nn.Module]) -> Weights:
    """Return the mean of models' weights."""
    return _mean([dict(model.state_dict()) for model in models])


def _mean(many: list[Weights]) -> Weights:
    return {k: torch.stack([one[k].double() for one in many]).mean(0) for k in many[0]}


# The stopwatch: processor seconds of this process and of all that descend from it.


@dataclass
class Stopwatch:
    """Seconds between start and stop, of the processor and on the wall."""

    cpu: float = 0.0
    wall: float = 0.0
    _began: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def start(self) -> None:
        self._began = (processor_seconds(), time.perf_counter())

    def stop(self) -> None:
        self.cpu = processor_seconds() - self._began[0]
        self.wall = time.perf_counter() - self._began[1]


def processor_seconds() -> float:
    """Return what this process and its descendants, living or gone, have used."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = sum(sum(int(n) for n in stat[11:15]) for _, stat in _descendants())
    return time.process_time() + gone.ru_utime + gone.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def peak_mebibytes() -> float:
    """Return the sum of the largest resident sizes of this process and its living descendants."""
    peaks = [_high_water(pid) for pid in ("self", *(pid for pid, _ in _descendants()))]
    return sum(peaks) / 1024


def _descendants() -> Iterator[tuple[str, list[str]]]:
    """Yield the living descendants, and what /proc/PID/stat holds after the name."""
    children: dict[str, list[tuple[str, list[str]]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        stat = text.rsplit(")", 1)[1].split()
        children.setdefault(stat[1], []).append((path.parent.name, stat))
    waiting = [str(os.getpid())]
    while waiting:
        for pid, stat in children.get(waiting.pop(), []):
            waiting.append(pid)
            yield pid, stat


def _high_water(pid: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # a process that has ended, but was not waited for, has no such line
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# The worker: one request and one answer per line.

Rounds = Callable[[Stopwatch, int, int, int], Weights]
Tune = Callable[[Stopwatch, int, int], "Weights | list[float]"]


def serve(rounds: Rounds, tune: Tune) -> None:
    """Do what is asked on standard input until it ends; what libraries print goes to the log."""
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        if what == "used":
            answer = {"cpu": processor_seconds(), "peak": peak_mebibytes()}
        elif what == "check":
            answer = check(rounds, tune, **asked)
        else:
            floor = asked.pop("floor")
            work = {
                ("rounds", False): rounds,
                ("rounds", True): plain_rounds,
                ("tune", False): tune,
                ("tune", True): plain_tune,
            }[what, floor]
            watch = Stopwatch()
            work(watch, batch=BATCH, **asked)
            answer = {"cpu": watch.cpu, "wall": watch.wall}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def check(rounds: Rounds, tune: Tune, *, count: int, tuned: int) -> dict[str, float]:
    """Compare results with the plain loop's, in one batch per epoch: no order of examples counts.

    Returns
    -------
    dict
        The largest differences of averaged weights and of fine-tuned ones (or their test losses),
        and the training loss before and after four rounds in small batches.
    """
    watch = Stopwatch()
    averaged = rounds(watch, count, 1, TRAIN)
    plain = plain_rounds(watch, count, 1, TRAIN)
    result = tune(watch, tuned, TRAIN)
    reference = _tuned(watch, tuned, TRAIN)
    if isinstance(result, dict):
        apart = difference(result, _mean([weights for weights, _ in reference]))
    else:
        pairs = zip(result, [loss for _, loss in reference], strict=True)
        apart = max(abs(a - b) for a, b in pairs)
    trained = start()
    before = _training_loss(trained)
    trained.load_state_dict(rounds(watch, 20, 4, BATCH), strict=False)
    return {
        "rounds": difference(averaged, plain),
        "tune": apart,
        "loss_before": before,
        "loss_after": _training_loss(trained),
    }


def difference(ours: Weights, reference: Weights) -> float:
    """Return the largest difference; what a library does not average is not compared."""
    parameters = {name for name, _ in start().named_parameters()}
    if missing := parameters - ours.keys():
        raise ValueError(f"the result has no {sorted(missing)[0]}; every parameter must be there")
    shared = [k for k in ours if not k.endswith("num_batches_tracked")]
    return max(float((ours[k].double() - reference[k].double()).abs().max()) for k in shared)


def _training_loss(model: Net) -> float:
    model.train()  # by the batch's statistics: not every library averages the running ones
    with torch.no_grad():
        return (
            sum(float(F.cross_entropy(model(one.x), one.y)) for one in map(client, range(20))) / 20
        )
