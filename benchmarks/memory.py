"""Memory of many clients: a CIFAR-10 of full size, dealt to 1,000 of them.

Writes an archive of 60,000 random images in the published format, opens it with 1,000 clients, runs
rounds of FedAvg with 100 of them and a small net, then personalizes all 1,000, in a process of its
own, and prints its resident memory after every stage. It must stay under 1.5 GB and not grow from
round to round:

    python benchmarks/memory.py [--folder DIR] [--clients 1000] [--cohort 100] [--rounds 3]
"""

from __future__ import annotations

import argparse
import gc
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedl2p.federation.listeners import Listener

LIMIT_GB = 1.5
GROWTH_GB = 0.05
"""What a later round may need more than the first: the allocator's play."""

STATUS = Path("/proc/self/status")


def write_files(folder: Path, train: int = 50_000, test: int = 10_000) -> None:
    """Write the files of the archive, with the writer of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from support import data_archives

    data_archives.write_cifar10(folder, train=train, test=test)


class Meter:
    """Prints resident memory, in GB, and what has been its peak."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        print(f"{'':<38}{'now':>8}{'of it':>9}{'peak':>8}{'time':>8}")
        print(f"{'GB':<38}{'':>8}{'mapped':>9}{'':>8}{'s':>8}")

    def __call__(self, what: str) -> float:
        gc.collect()
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        now, mapped = (int(lines[k].split()[0]) / 1e6 for k in ("VmRSS", "RssFile"))
        seconds = time.perf_counter() - self.began
        print(f"{what:<38}{now:>8.2f}{mapped:>9.2f}{peak():>8.2f}{seconds:>8.1f}", flush=True)
        return now


def peak() -> float:
    """Peak resident memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(folder: Path, clients: int, cohort: int, rounds: int) -> None:
    """Open, train and personalize, and check the limits."""
    meter = Meter()
    from fedl2p import methods, models
    from fedl2p.data.cifar10 import Cifar10
    from fedl2p.federation.clients.in_process import in_process
    from fedl2p.federation.personalizing import personalize_all
    from fedl2p.federation.round_records import RoundRecord
    from fedl2p.federation.rounds import federate
    from fedl2p.federation.settings import Rounds
    from fedl2p.methods.base.settings import LocalTraining, Settings

    meter("packages imported")
    each = 50_000 // clients
    source = Cifar10(
        root=folder,
        seen=clients,
        alpha=0.5,
        train=each - each // 5,
        validation=each // 5,
        test=10_000 // clients,
    )
    source.open(0)
    meter("files decoded and dealt out")
    population = source.open(0)
    meter("opened again")
    model = models.build("fedl2p.models:small_conv", shape=(3, 32, 32), classes=10, seed=0)
    method = methods.build("fedavg", Settings(local=LocalTraining(rate=0.1)))
    where = in_process(model, population, {method.name: method})
    after: list[float] = []

    class Watch(Listener):
        def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
            pass

        def on_round(self, record: RoundRecord) -> None:
            if record.round <= rounds:  # one more judges the last state
                after.append(meter(f"round {record.round} of {record.clients} clients"))

        def on_end(self, stage: str) -> None:
            pass

    done = federate(
        method,
        model,
        population,
        rounds=Rounds(rounds=rounds, clients_per_round=cohort, keep="last"),
        seed=0,
        stage="pretrain",
        clients=where,
        listeners=[Watch()],
    )
    outcomes = personalize_all(method, model, done.state, population, seed=0, clients=where)
    meter(f"{len(outcomes)} clients personalized")
    assert len(outcomes) == clients
    assert all(outcome.failure is None for outcome in outcomes)
    grown = max(after) - after[0]
    print(f"peak {peak():.2f} GB (limit {LIMIT_GB}); rounds 2 to {rounds} grew {grown:+.3f} GB")
    if peak() > LIMIT_GB or grown > GROWTH_GB:
        sys.exit("too much memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the archive is, or is to be written")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.folder, options.clients, options.cohort, options.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="fedl2p-memory-") as temporary:
        folder = options.folder or Path(temporary)
        if not any(folder.glob("cifar-10-*")):
            write_files(folder)
        # A process of its own, whose peak is not that of writing the files.
        sizes = [f"--{k}={getattr(options, k)}" for k in ("clients", "cohort", "rounds")]
        done = subprocess.run(
            [sys.executable, __file__, "--measure", f"--folder={folder}", *sizes], check=False
        )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
