"""What the command `fedl2p run` costs as a whole: start-up, a busy machine, memory.

    python benchmarks/command.py                # all of it, some ten minutes; prints
    python benchmarks/command.py startup busy   # parts of it

startup  processor seconds until the first round of `smoke` is over, and those of `import torch`
busy     wall-clock seconds of `smoke` with default threads and with one, alone and beside two
         processes that never pause, in turns
memory   most resident memory of `digits`, and of `smoke` after its first rounds of learning and
         after 1,000 of them (--rounds)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

COMMAND = [sys.executable, "-m", "fedl2p", "run"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
BUSY = [sys.executable, "-c", "while True: pass"]
REPEATS = 3
EARLY = 30
"""Rounds after which memory is looked at first."""


@contextlib.contextmanager
def running(*options: str, **environment: str) -> Iterator[tuple[psutil.Popen, Path]]:
    """Yield a started `fedl2p run` and its folder; it is stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        process = psutil.Popen(
            [*COMMAND, *options, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
        try:
            yield process, out
        finally:
            if process.is_running():
                process.kill()
            process.wait()


def rounds_of(out: Path) -> int:
    """Return how many rounds a run has recorded."""
    try:
        return len((out / "rounds.csv").read_text().splitlines()) - 1
    except OSError:
        return 0


def until(done: Callable[[], bool], process: psutil.Popen) -> None:
    """Wait until something holds; refuse a process that ends before."""
    while not done():
        if process.poll() is not None:
            raise RuntimeError(f"the command ended with {process.returncode}")
        time.sleep(0.01)


def startup() -> None:
    """Print the processor time of a start."""
    first, torch = [], []
    for _ in range(REPEATS):
        with running("smoke", **ONE_THREAD) as (process, out):
            until(lambda o=out: rounds_of(o) > 0, process)
            first.append(sum(process.cpu_times()[:2]))
        code = "import os, torch; print(sum(os.times()[:2]))"
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        torch.append(float(done.stdout))
    print(f"until the first round of smoke is over: {said(first)} s of processor time")
    print(f"import torch: {said(torch)} s of processor time", flush=True)


def busy() -> None:
    """Print how long the command takes beside others."""
    for beside in (0, 2):
        others = [subprocess.Popen(BUSY) for _ in range(beside)]
        took: dict[str, list[float]] = {"default threads": [], "one thread": []}
        try:
            for _ in range(REPEATS):
                for name, environment in zip(took, ({}, ONE_THREAD), strict=True):
                    began = time.perf_counter()
                    with running("smoke", **environment) as (process, _):
                        if process.wait():
                            raise RuntimeError(f"the command ended with {process.returncode}")
                    took[name].append(time.perf_counter() - began)
        finally:
            for other in others:
                other.kill()
                other.wait()
        for name, times in took.items():
            print(f"smoke, {name}, {beside} busy processes beside it: {said(times)} s", flush=True)


def memory(rounds: int) -> None:
    """Print what the command holds."""
    options = ("--learn.rounds", str(rounds), "--methods", "fedl2p")
    with running("smoke", *options, **ONE_THREAD) as (process, out):
        for count in (EARLY, rounds):
            until(lambda o=out, c=count: rounds_of(o) >= c, process)
            held = process.memory_info().rss >> 20
            print(f"smoke, {count} rounds recorded: {held} MiB", flush=True)
    most = 0
    with running("digits", **ONE_THREAD) as (process, _):
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                most = max(most, process.memory_info().rss >> 20)
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"the command ended with {process.returncode}")
    print(f"digits, report included: at most {most} MiB", flush=True)


def said(values: list[float]) -> str:
    """Return the median, and in brackets least and most."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = ("startup", "busy", "memory")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"there is no {min(unknown)!r}; there are {', '.join(parts)}")
    for part in options.parts or parts:
        if part == "memory":
            memory(options.rounds)
        else:
            {"startup": startup, "busy": busy}[part]()


if __name__ == "__main__":
    main()
