"""Runs of the command that can be killed cheaply: a server imports the package once, and forks."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# What a run imports, torch's later imports and the report's too.
_PRELOADED = (
    *("fedl2p.cli.entry", "fedl2p.study.settings", "fedl2p.reporting.page", "fedl2p.recipes.smoke"),
    *("fedl2p.methods.fedl2p", "fedl2p.methods.gridsearch", "fedl2p.methods.local"),
    *("sklearn.datasets", "tyro", "jinja2", "torch._dynamo", "torch.onnx"),
)

TINY = (
    *("--data.seen", 4, "--data.unseen", 2, "--data.train", 24, "--data.validation", 12),
    *("--data.test", 12, "--pretrain.rounds", 6, "--pretrain.clients-per-round", 3),
    *("--learn.rounds", 4, "--learn.clients-per-round", 3, "--settings.finetune.epochs", 1),
    *("--methods", "fedavg", "finetuning-client", "bestfixed", "fedl2p"),
)
"""Fields that make the recipe smoke a matter of two seconds, with every kind of stage."""


def start(
    args: Sequence[object], said: Path, *, file_limit: int = 0, die_at: int = 0
) -> ForkServerProcess:
    """Start the command in a process of its own; what it says is appended to a file.

    Parameters
    ----------
    args
        Its arguments.
    said
        Where standard output and standard error go.
    file_limit
        Largest file that it may write, bytes; 0 for any.
    die_at
        At which of its files it is killed: at an odd one as soon as it has its name, at an even
        one before; 0 for none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    given = ([str(arg) for arg in args], said, file_limit, die_at)
    process = context.Process(target=_command, args=given)
    process.start()
    return process


def call(args: Sequence[object], said: Path, *, file_limit: int = 0) -> int:
    """Run the command to its end and return its exit status."""
    process = start(args, said, file_limit=file_limit)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _command(args: list[str], said: Path, file_limit: int, die_at: int) -> None:
    import torch

    from fedl2p.cli import entry as cli

    torch.set_num_threads(1)
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if file_limit:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if die_at:
        _die_at(die_at)
    with contextlib.suppress(BrokenPipeError):
        try:
            cli.main(args)
        finally:
            sys.stdout.flush()


def _die_at(number: int) -> None:
    """Kill this process at one of the files that it writes, each by a rename at its end."""
    import signal

    rename, left = os.replace, number

    def replace(*args: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if not left and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **options)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def result(folder: Path) -> dict[str, object]:
    """Everything that a run leaves behind and that must not depend on how often it was stopped.

    All files but the log, the report (made of the others) and the wall-clock seconds in them.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in ("log.txt", "report.html"):
            continue
        if path.suffix == ".csv":
            found[name] = _without_column(path.read_text(), "seconds")
        elif path.suffix == ".json":
            found[name] = _without_seconds(json.loads(path.read_text()))
        elif name.startswith("checkpoint"):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["fedl2p"])
                tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118
            found[name] = [_without_seconds(header), tensors]
        else:
            found[name] = path.read_bytes()
    return found


def _without_column(text: str, column: str) -> list[list[str]]:
    import csv

    lines = list(csv.reader(text.splitlines()))
    drop = lines[0].index(column) if column in lines[0] else None
    return [[field for i, field in enumerate(line) if i != drop] for line in lines]


def _without_seconds(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if not k.startswith("seconds")}
    if isinstance(value, list):
        return [_without_seconds(item) for item in value]
    return value
