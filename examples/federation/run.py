"""A whole federation on this machine: TLS, authenticated SuperNodes, three clients and a latecomer.

    python examples/federation/run.py runs/federation

Everything is as it would be on machines of their own (docs/deploy.md takes the same steps one by
one), only on the loopback address: a SuperLink with a certificate, three SuperNodes with a key, a
data folder and an output folder each. They pre-train a global model (or are given one by
--pretrained), learn the meta-nets and personalize it; each personalized model stays on its node.
Then a fourth node joins, is sent the global model and the meta-nets, and personalizes itself.

Exit status 0 if all of it went well; every process is stopped before that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machines import Machines

from fedl2p.data.digits import Digits

CLIENTS = ("hospital-a", "hospital-b", "hospital-c")
LATECOMER = "hospital-d"
PARTS = ("train", "validation", "test")
ON_A_NODE = ("model.safetensors", "hyperparams.json", "outcome.json")


def make_data(folder: Path, *, seed: int) -> None:
    """Write each client's handwritten digits, seen through its own sensor, as one .npz file."""
    population = Digits(seen=3, unseen=1, train=64, validation=32, test=48).open(seed)
    for name, source in zip((*CLIENTS, LATECOMER), population.names, strict=True):
        data = population.open(source)
        parts = {part: getattr(data, part) for part in PARTS}
        arrays = {f"x_{part}": examples.x.numpy() for part, examples in parts.items()}
        arrays |= {f"y_{part}": examples.y.numpy() for part, examples in parts.items()}
        place = folder / "nodes" / name / "data"
        place.mkdir(parents=True)
        np.savez(place / f"{name}.npz", **arrays)


def join(machines: Machines, name: str) -> None:
    """Register a SuperNode and start it."""
    machines.register(name)
    home = machines.folder / "nodes" / name
    machines.start_supernode(name, {"client": name, "data": home / "data", "out": home / "out"})


def do(machines: Machines, config: dict[str, str | int | float | bool]) -> None:
    """Submit a run and wait for its end; raise RuntimeError if it failed."""
    run = machines.submit(config)
    status = machines.follow(run)
    if status != "finished:completed":
        raise RuntimeError(f"run {run} ended as {status}; see {machines.logs}")


def check_nodes(folder: Path, names: tuple[str, ...]) -> None:
    """Print what each node has, and raise RuntimeError if one lacks its personalized model."""
    for name in names:
        out = folder / "nodes" / name / "out"
        missing = [file for file in ON_A_NODE if not (out / "fedl2p" / file).is_file()]
        if missing:
            raise RuntimeError(f"{name} has no {missing[0]}; {out / 'log.txt'} says why")
        outcome = json.loads((out / "fedl2p" / "outcome.json").read_text())
        print(
            f"{name}: {100 * outcome['accuracy_before']:.1f} % before, "
            f"{100 * outcome['accuracy']:.1f} % after personalization; {out / 'fedl2p'}"
        )


def personalize_again(folder: Path, name: str) -> None:
    """On the node alone, without the SuperLink: with what it has received, from all its data."""
    home = folder / "nodes" / name
    command = [sys.executable, "-m", "fedl2p", "personalize"]
    command += ["--run", home / "out" / "received", "--data", home / "data" / f"{name}.npz"]
    subprocess.run([*map(str, command), "--out", str(home / "again")], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder for everything")
    parser.add_argument("--pretrain-rounds", type=int, default=10)
    parser.add_argument("--learn-rounds", type=int, default=5)
    parser.add_argument("--pretrained", type=Path, help="global model, a safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if folder.exists():
        parser.error(f"{folder} exists; name a new folder")
    study: dict[str, str | int | float | bool] = {
        "data.shape": "1,8,8",
        "data.classes": 10,
        "seed": args.seed,
        "pretrain.rounds": args.pretrain_rounds,
        "learn.rounds": args.learn_rounds,
    }
    given = {"pretrained": str(args.pretrained.resolve())} if args.pretrained else {}
    began = time.monotonic()
    try:
        with Machines(folder) as machines:
            make_data(folder, seed=args.seed)
            machines.start_superlink()
            for name in CLIENTS:
                join(machines, name)
            server = folder / "server"
            do(machines, study | given | {"min-clients": 3, "out": str(server / "study")})
            join(machines, LATECOMER)
            again = {"task": "personalize", "run": str(server / "study")}
            do(machines, study | again | {"clients": LATECOMER, "out": str(server / "latecomer")})
        print((server / "study" / "rounds.csv").read_text())
        check_nodes(folder, (*CLIENTS, LATECOMER))
        personalize_again(folder, LATECOMER)
    except (RuntimeError, OSError, TimeoutError, subprocess.SubprocessError) as problem:
        sys.exit(f"run.py: {problem}")
    print(f"done in {time.monotonic() - began:.0f} s; the server's side is in {server}")


if __name__ == "__main__":
    main()
