"""fedl2p beside other libraries for federated learning: the same work, in turns, in one table.

Each library is installed from PyPI into an environment of its own (``.venv-peers/``), on the torch
of ``requirements.lock``, and driven through its public interface by one file of
``benchmarks/peer_drivers/``; that file's first lines say which. Before anything is measured, a
driver's results are compared with those of the plain PyTorch loop
(``benchmarks/peer_drivers/work.py``), which is also the floor that it is measured against, in the
same process, right before or after.

    python benchmarks/peers.py                        # all: installs once, then about ten minutes
    python benchmarks/peers.py --peers fedl2p pfl     # these again; the other rows stay
    python benchmarks/peers.py --turns 9

A library that cannot be installed or fails gets a row with the reason, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_environments import ENVIRONMENTS, PEERS, PeerError, install, python_of, version_of

DRIVERS = Path(__file__).parent / "peer_drivers"
RESULT = Path(__file__).parent / "results" / "peers.md"
RECORDS = RESULT.with_suffix(".jsonl")
JOBS = 3
"""Processes of their own, for start-up and memory."""
LIMIT = 300.0
"""Seconds after which one piece of work counts as hanging."""
TOLERANCE = 1e-4
"""Largest difference from the plain loop's weights or losses, in float32."""

Record = dict[str, Any]


WORKS: dict[str, Record] = {
    "round of 20": {"do": "rounds", "count": 20, "number": 4},
    "round of 100": {"do": "rounds", "count": 100, "number": 1},
    "fine-tuning of 60": {"do": "tune", "count": 60},
}


class Worker:
    """A library's driver in a process of its own, one thread; asked and answering line by line."""

    def __init__(self, name: str) -> None:
        self.log = ENVIRONMENTS / f"{name}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if PEERS[name].package is not None:
            environment.pop("PYTHONPATH", None)
        self.began = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python_of(name), DRIVERS / f"with_{name}.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, **request: object) -> Record:
        """Return the answer to a request of ``peer_drivers/work.py``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        guard = threading.Timer(LIMIT, self.process.kill)
        guard.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            guard.cancel()
        if not answer:
            said = [line for line in self.log.read_text().splitlines() if line.strip()]
            raise PeerError(f"failed at {request}: {said[-1] if said else 'it said nothing'}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process: it ends itself when nothing more is asked."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def checked(worker: Worker) -> Record:
    """Return how far results are from the plain loop's, or refuse them."""
    found = worker.ask(do="check", count=100, tuned=60)
    for what in ("rounds", "tune"):
        if not found[what] < TOLERANCE:  # NaN too
            raise PeerError(
                f"{what} end {found[what]:.1e} from the plain loop's result, more than {TOLERANCE}"
            )
    if not found["loss_after"] < found["loss_before"]:
        raise PeerError(
            f"the loss went from {found['loss_before']:.3f} to {found['loss_after']:.3f}, so that "
            "it did not train"
        )
    return found


def one_turn(worker: Worker, turn: int) -> Record:
    """Return seconds of every work, the library's and the floor's next to it."""
    times: Record = {}
    for what, request in WORKS.items():
        pair = {}
        for floor in (True, False) if turn % 2 else (False, True):
            pair["floor" if floor else "ours"] = worker.ask(floor=floor, **request)
        times[what] = pair
    return times


def one_job(name: str) -> Record:
    """Return start-up to the end of the first round, and the peak of all works in a new process."""
    worker = Worker(name)
    try:
        worker.ask(do="rounds", floor=False, count=20, number=1)
        wall = time.perf_counter() - worker.began
        used = worker.ask(do="used")
        for request in WORKS.values():
            worker.ask(floor=False, **request)
        return {"cpu": used["cpu"], "wall": wall, "peak": worker.ask(do="used")["peak"]}
    finally:
        worker.close()


def measure(names: Sequence[str], turns: int) -> dict[str, Record]:
    """Return a record per library: all in turns, first the works, then whole jobs."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    records: dict[str, Record] = {}
    workers: dict[str, Worker] = {}

    def attempt(name: str, do: Any) -> None:
        if "failed" not in records[name]:
            try:
                do()
            except PeerError as error:
                records[name] = {**about(name), "failed": str(error)}
                print(f"{name}: {error}", file=sys.stderr, flush=True)

    def begin(name: str) -> None:
        install(name)
        workers[name] = Worker(name)
        records[name] |= {"version": version_of(name), "check": checked(workers[name])}
        one_turn(workers[name], 0)  # a warm-up

    for name in names:
        records[name] = {**about(name), "turns": [], "jobs": []}
        attempt(name, lambda name=name: begin(name))
    try:
        for turn in range(turns):
            print(f"turn {turn + 1} of {turns}", flush=True)
            for name in names:
                attempt(name, lambda name=name, turn=turn: records[name]["turns"].append(
                    one_turn(workers[name], turn)
                ))  # fmt: skip
    finally:
        for worker in workers.values():
            worker.close()
    for job in range(JOBS):
        print(f"start-up and memory, {job + 1} of {JOBS}", flush=True)
        for name in names:
            attempt(name, lambda name=name: records[name]["jobs"].append(one_job(name)))
    return records


def about(name: str) -> Record:
    """Return what identifies a measurement."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {
        "peer": name,
        "version": PEERS[name].version,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load": round(os.getloadavg()[0], 1),
    }


def ratios(record: Record, what: str, clock: str) -> list[float]:
    """Return the library's seconds over the floor's, turn by turn."""
    pairs = [turn[what] for turn in record["turns"]]
    return [pair["ours"][clock] / pair["floor"][clock] for pair in pairs]


def table(records: Mapping[str, Record]) -> str:
    """Return the tables, from records by library, as Markdown."""
    good = {name: r for name, r in records.items() if "failed" not in r}
    lines = [
        "# Other libraries",
        "",
        "Written by `python benchmarks/peers.py`, whose first lines and those of "
        "`benchmarks/peer_drivers/` say what is done: a FedAvg round of 20 and of 100 clients (96 "
        "images of 8 x 8, one epoch in batches of 32, the small net of `benchmarks/speed.py`), and "
        "fine-tuning of 60 clients (5 epochs, the test part judged before and after), with one "
        "thread. Figures are seconds over those of a plain PyTorch loop that does the same, in "
        "the same process and next to it: the median of the turns and, in brackets, the least and "
        "the greatest. Processor seconds count a library's other processes; they tell the same on "
        "a machine that others use too, wall-clock seconds do not.",
        "",
        f"| library | {' | '.join(f'{w}, processor' for w in WORKS)} "
        f"| {' | '.join(f'{w}, wall' for w in WORKS)} |",
        "|---|" + "---:|" * (2 * len(WORKS)),
    ]
    for name, record in records.items():
        if name not in good:
            lines.append(f"| {name} |" + " |" * (2 * len(WORKS)))
            continue
        cells = [
            f"{statistics.median(found):.2f} ({min(found):.2f}, {max(found):.2f})"
            for clock in ("cpu", "wall")
            for found in (ratios(record, what, clock) for what in WORKS)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"A process of its own, medians of {JOBS}: from its start to the end of the first round of "
        "20 clients (fedl2p: with the choice of stacks that an earlier process left on the "
        "machine), and the most memory while it does all of the works once, resident sizes of all "
        "its processes added up.",
        "",
        "| library | start-up, processor s | start-up, wall s | memory, MiB |",
        "|---|---:|---:|---:|",
    ]
    for name, record in good.items():
        cpu, wall, peak = (
            statistics.median(job[key] for job in record["jobs"]) for key in ("cpu", "wall", "peak")
        )
        lines.append(f"| {name} | {cpu:.1f} | {wall:.1f} | {peak:.0f} |")
    lines += [
        "",
        "What was measured, when and where. Results differ: the largest difference from the plain "
        "loop's result, with all of a client's examples in one batch so that their order does not "
        "count, of the mean of 100 clients' weights after a round, and after fine-tuning (of the "
        "mean of the weights, or of the clients' losses where models stay with the clients).",
        "",
        "| library | version | turns | results differ: round, fine-tuning | measured (UTC) "
        "| load | remark |",
        "|---|---|---:|---|---|---:|---|",
    ]
    for name, record in records.items():
        check = record.get("check")
        apart = f"{check['rounds']:.0e}, {check['tune']:.0e}" if check else ""
        turns = str(len(record["turns"])) if name in good else ""
        remark = record.get("failed") or PEERS[name].remark
        lines.append(
            f"| {name} | {record['version']} | {turns} | {apart} | {record['date']} "
            f"| {record['load']} | {remark} |"
        )
    machines = sorted({record["machine"] for record in records.values()})
    lines += ["", f"Machine: {'; '.join(machines)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, merge with what other runs recorded, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if options.turns < 1:
        parser.error(f"--turns is {options.turns}, but must be at least 1")
    earlier = {}
    if RECORDS.exists():
        read = [json.loads(line) for line in RECORDS.read_text().splitlines()]
        earlier = {record["peer"]: record for record in read}
    fresh = measure(options.peers, options.turns)
    both = earlier | fresh
    records = {name: both[name] for name in PEERS if name in both}
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
    RESULT.write_text(table(records))
    print(RESULT.read_text())
    if failed := [name for name in options.peers if "failed" in fresh[name]]:
        sys.exit(f"no figures of {', '.join(failed)}: the reason is in {RESULT}")


if __name__ == "__main__":
    main()
