"""Whether a stack of clients takes less time than one by one, measured on this machine.

Stacked convolutions are grouped ones, and how well a processor does those depends on the processor
and on the shapes (``benchmarks/cohorts.py``). So an inner step is timed at first use. The answer is
stored in the user's cache folder, so that later runs, and other processes of the same run, cut the
same stacks and give the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedl2p import atomic_files
from fedl2p.core import trees
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.trees import Tree

ROWS = 32
"""Examples per client of a timed step."""

SECONDS = 1.0
"""Processor time after which no further turn begins."""

TURNS = 7
"""Most turns; the shortest time counts."""

log = logging.getLogger("fedl2p")

_lock = threading.Lock()


def stacks_pay(net: FunctionalModel, x: Tree, size: int) -> bool:
    """Tell whether a stack takes less time than its clients one by one.

    Parameters
    ----------
    net
        A model that vmap can run.
    x
        Inputs of one client, (n, ...) with n of 1 or more; only their kind matters.
    size
        Most clients of a stack, at least 2.
    """
    here = size, trees.kind(x)
    with _lock:
        if here not in net.stacks_pay:
            key = _key(net, x, size)
            known = _stored(key)
            net.stacks_pay[here] = _measure(net, x, size, key) if known is None else known
        return net.stacks_pay[here]


def _key(net: FunctionalModel, x: Tree, size: int) -> str:
    """Return what the answer depends on, as the name of a file."""
    described = repr(
        (
            _processor(),
            torch.__version__,
            size,
            trees.kind(x),
            repr(net.plain),
            [(k, tuple(p.shape), str(p.dtype)) for k, p in net.plain.named_parameters()],
        )
    )
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _processor() -> str:
    """Return the model of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _file(key: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedl2p" / "stacking" / f"{key}.json"


def _stored(key: str) -> bool | None:
    """Return the answer of an earlier measurement; None if there is none that can be read."""
    try:
        answer = json.loads(atomic_files.read_text(_file(key)))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return answer if isinstance(answer, bool) else None


def _measure(net: FunctionalModel, x: Tree, size: int, key: str) -> bool:
    alone, stacked = _times(net, trees.rows(x, torch.arange(ROWS) % trees.length(x)), size)
    pays = stacked < size * alone
    log.info(
        "clients are computed %s: a step of %d takes %.2g of the time of as many alone",
        "in stacks" if pays else "one by one",
        size,
        stacked / (size * alone),
    )
    try:
        path = _file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(path, f"{json.dumps(pays)}\n", sync=False)
    except (OSError, RuntimeError) as problem:
        log.warning(
            "whether clients are stacked cannot be stored (%s), so another process may decide "
            "otherwise, and its results differ by rounding; set XDG_CACHE_HOME to a folder that "
            "can be written, or compute.stacking to 'always'",
            problem,
        )
    # another process may have been faster: one answer holds for all
    stored = _stored(key)
    return pays if stored is None else stored


def _times(net: FunctionalModel, x: Tree, size: int) -> tuple[float, float]:
    """Return processor seconds of a first-order step: of one client, and of a stack.

    With client statistics alone, which one client by itself computes fastest.
    """
    best, threads = [math.inf] * 2, torch.get_num_threads()
    one = net.start(1, "global").squeezed()
    own = {k: v.clone().requires_grad_() for k, v in one.params.items()}
    mix = torch.ones(len(net.sites.norms), dtype=net.dtype)
    torch.set_num_threads(1)
    try:
        with net.bind(own, {k: v.clone() for k, v in one.stats.items()}, mix) as bound:
            steps = [
                lambda: _differentiate(bound.logits(x), own),
                _stacked_step(net, x, size),
            ]
            began = time.thread_time()
            for turn in range(1 + TURNS):
                for i, step in enumerate(steps):
                    start = time.thread_time()
                    with torch.enable_grad():
                        step()
                    if turn:  # the first one warms up
                        best[i] = min(best[i], time.thread_time() - start)
                if turn and time.thread_time() - began > SECONDS:
                    break
    finally:
        torch.set_num_threads(threads)
    return best[0], best[1]


def _stacked_step(net: FunctionalModel, x: Tree, clients: int) -> Callable[[], None]:
    start = net.start(clients, "global")
    params = {k: v.clone().requires_grad_() for k, v in start.params.items()}
    mix = torch.ones(clients, len(net.sites.norms), dtype=net.dtype)
    inputs = trees.stack([x] * clients)

    def step() -> None:
        run = net.stacked(params, start.stats, mix, inputs, training=True, first_order=True)
        _differentiate(run[0], params)

    return step


def _differentiate(outputs: Any, params: dict[str, Tensor]) -> None:
    real = [t for t in trees.leaves(outputs) if t.is_floating_point()]
    loss = torch.stack([t.square().sum() for t in real]).sum()
    torch.autograd.grad(loss, list(params.values()), allow_unused=True)
