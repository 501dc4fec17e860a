"""Names of the files of a run's folder. No other module spells one."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

CONFIG = "config.json"
"""The study's settings, and the versions that started the run."""

POPULATION = "population.json"
"""Names and pools of the clients, the shape of an example, the number of classes."""

RESULTS = "results.json"
"""The summary of a finished run."""

CLIENTS = "clients.csv"
"""One line per method and client."""

ROUNDS = "rounds.csv"
"""One line per round."""

FAILURES = "failures.csv"
"""One line per failed client and round."""

PAGE = "report.html"
"""The report."""

GLOBAL_MODEL = "global.safetensors"
"""Weights of the pre-trained model."""

METANETS_FILES = ("metanets.safetensors", "metanets.json")
"""The meta-nets, as :meth:`fedl2p.MetaNets.save` names them; README.md is their card."""

LOG = "log.txt"
"""What the package logged."""

LOG_JSON = "log.jsonl"
"""The same, one JSON object per line, in its place where FEDL2P_LOG is json."""

LOCK = ".run.lock"
"""Locked by the process that runs."""

CHECKPOINT = "checkpoint"
"""Folder of a stopped run's state: one folder per stage, one file per personalized method."""

CLIENT_FOLDER = "clients"
"""Folder of the clients' hyperparameters, ``clients/<method>/<client>.json``."""

EXPLAIN = "explain"
"""Folder of explanations."""

TENSORBOARD = "tensorboard"
"""Folder of the rounds for TensorBoard."""

CONTENT = (
    *(CONFIG, POPULATION, RESULTS, CLIENTS, ROUNDS, FAILURES, PAGE, GLOBAL_MODEL),
    *(*METANETS_FILES, CHECKPOINT, CLIENT_FOLDER),
)
"""A folder that holds one of these names holds a run."""

MODEL = "model.safetensors"
"""A client's personalized model, in a folder of its own."""

HYPERPARAMS = "hyperparams.json"
"""Beside it: what it was fine-tuned with, and the profile behind that."""

OUTCOME = "outcome.json"
"""Beside it: numbers of examples, accuracy and loss before and after."""

PERSONAL = (MODEL, HYPERPARAMS, OUTCOME)


def as_file_name(name: str) -> str:
    """Return a name of a method or client as that of a file: it cannot leave its folder."""
    return quote(name, safe=" ")


def client_file(run: Path, method: str, client: str) -> Path:
    """Return the file of a client's hyperparameters under a method."""
    return run / CLIENT_FOLDER / as_file_name(method) / f"{as_file_name(client)}.json"


def client_files(run: Path) -> list[Path]:
    """Return all files of clients' hyperparameters, sorted."""
    return sorted((run / CLIENT_FOLDER).glob("*/*.json"))


def stage_checkpoint(run: Path, stage: str) -> Path:
    """Return the folder of a stage's checkpoints."""
    return run / CHECKPOINT / stage


def outcomes_file(run: Path, method: str) -> Path:
    """Return the file of a method's rows, written when its clients are personalized."""
    return run / CHECKPOINT / "outcomes" / f"{method}.json"
