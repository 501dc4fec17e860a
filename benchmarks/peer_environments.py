"""The libraries of ``benchmarks/peers.py``, and an environment for each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-peers"


class PeerError(Exception):
    """A library that gives no figures; the message says why, in one line."""


@dataclass(frozen=True)
class Peer:
    """A library, and how it is installed.

    Parameters
    ----------
    package
        Its name on PyPI; None for what runs in the environment of this script.
    version
        The version that its driver was written for.
    pip
        Arguments of ``pip install``, one call after another.
    unlocked
        Packages that may have other versions than in ``requirements.lock``.
    remark
        What a reader of its row has to know.
    """

    package: str | None = None
    version: str = ""
    pip: tuple[tuple[str, ...], ...] = ()
    unlocked: tuple[str, ...] = ()
    remark: str = ""


PEERS = {
    "plain": Peer(remark="the floor, measured against itself: how far turns differ"),
    "fedl2p": Peer(remark="in process; a round validates and checks every answer"),
    "pfl": Peer(
        package="pfl",
        version="0.6.0",
        pip=(("pfl==0.6.0",),),
        unlocked=("absl-py", "dp-accounting"),  # it wants older ones
        remark="buffers are not averaged; fine-tuning judges the training part too",
    ),
    "blazefl": Peer(
        package="blazefl",
        version="2.0.3",
        pip=(("--ignore-requires-python", "blazefl[contrib,reproducibility]==2.0.3"),),
        remark="the last version whose code Python 3.11 reads, though it asks for 3.12; 3.0.0 "
        "needs 3.14. Serial trainer; it has no fine-tuning of its own",
    ),
    "fluke": Peer(
        package="fluke-fl",
        version="0.8.1",
        pip=(
            ("--no-deps", "fluke-fl==0.8.1"),
            # what FedAvg imports; not torchvision, opacus, wandb, clearml, datasets, hydra
            (
                "cerberus",
                "diskcache",
                "matplotlib",
                "omegaconf",
                "pandas",
                "psutil",
                "pyyaml",
                "rich",
                "scikit-learn",
                "seaborn",
                "torchmetrics",
            ),
        ),
        remark="without the requirements that FedAvg does not import; fine-tuning judges accuracy",
    ),
    "flower": Peer(
        package="flwr",
        version="1.41.0",
        pip=(("flwr[simulation]==1.41.0",),),
        remark="simulation, one Ray worker; processes of Ray count",
    ),
}


def python_of(name: str) -> Path:
    """Return the interpreter of a library's environment."""
    if PEERS[name].package is None:
        return Path(sys.executable)
    return ENVIRONMENTS / name / "bin" / "python"


def install(name: str) -> None:
    """Make a library's environment, unless it is there with the same arguments of pip."""
    peer = PEERS[name]
    if peer.package is None:
        return
    folder = ENVIRONMENTS / name
    stamp, wanted = folder / ".installed", json.dumps([peer.pip, peer.unlocked])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {name} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    held = [line for line in locked if line.split("==")[0] not in peer.unlocked]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(held) + "\n")
    for arguments in (("torch", "numpy"), *peer.pip):
        done = subprocess.run(
            [python_of(name), "-m", "pip", "install", "--quiet", "-c", constraints, *arguments],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip said nothing"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise PeerError(f"not installed: {reason.removeprefix('ERROR: ')}")
    stamp.write_text(wanted)


def version_of(name: str) -> str:
    """Return the installed version of a library; of fedl2p with its revision."""
    peer = PEERS[name]
    if peer.package is not None:
        code = f"from importlib.metadata import version; print(version({peer.package!r}))"
        return _said([python_of(name), "-c", code])
    if name == "plain":
        return f"torch {_said([sys.executable, '-c', 'import torch; print(torch.__version__)'])}"
    version = _said([sys.executable, "-c", "import fedl2p; print(fedl2p.__version__)"])
    revision = _said(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"])
    changed = _said(["git", "-C", ROOT, "status", "--porcelain", "--", "src"])
    return f"{version}, revision {revision}{' and changes' if changed else ''}"


def _said(command: Sequence[str | Path]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
