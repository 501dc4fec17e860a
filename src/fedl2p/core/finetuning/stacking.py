"""Many clients in one call: stacked where their shapes agree, one after another where not.

A cohort is cut into groups of clients whose examples have equal shapes, sorted by their number,
and each group into stacks; within a stack every tensor has a leading client dimension and the model
runs under vmap. At each step those clients of a stack go together whose batches have equal lengths,
so that no batch is padded (:class:`~fedl2p.core.finetuning.batches.EpochBatches`). Where a method
cannot do with that, the clients of a stack have equally many examples. A client alone runs without
vmap. The code is the same either way, and so are the results up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import nan
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import together
from fedl2p.core.finetuning.sgd_step import cross_entropy
from fedl2p.core.functional.inspection import structure
from fedl2p.core.functional.model import Net, NetState
from fedl2p.core.profiles import Profiler

STACK_VALUES = 2_000
"""Input values of one example up to which clients are stacked on a CPU: 16 x 16 pixels in colour, a
log-mel of 49 x 40. Larger inputs, and models that are not small, fill the cores by themselves
(``benchmarks/cohorts.py``)."""

STACK_VALUES_GPU = 40_000
"""Input values that one example per client of a stack may have together on a GPU, whatever the
model; a bound to the memory that was not measured on one."""

T = TypeVar("T")


@dataclass(frozen=True)
class Resident:
    """Private working copies of one model, kept between calls."""

    net: Net
    profiler: Profiler
    version: Hashable


_residents: WeakKeyDictionary[nn.Module, Resident] = WeakKeyDictionary()


def resident(model: nn.Module) -> Resident:
    """Return the working copies of ``model``; made anew when its tensors or its build have changed.

    A change of a tensor is seen by torch's version counter, by its place in memory and by its
    ``requires_grad``; one of the build by modes, hooks and plain settings of the modules. Writing
    in place through ``tensor.data`` leaves no trace in these and is not
    seen: write under ``torch.no_grad()`` instead, or into a new model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    version = (
        tuple((t.data_ptr(), t._version, t.requires_grad) for t in tensors),
        structure(model),
    )
    known = _residents.get(model)
    if known is None or known.version != version:
        known = Resident(Net(model), Profiler(model), version)
        _residents[model] = known
    return known


def stacks(
    net: Net, data: Sequence[ClientData], *, size: int | None = None, ragged: bool = False
) -> Iterator[list[int]]:
    """Cut clients into stacks of at most ``size`` (the net's own by default); yields positions.

    Clients are cut by position into chunks of that size, and each chunk into stacks: so whoever
    calls with whole chunks, in one call or in several, gets the same stacks.
    Those of a stack have equally many examples or, if ``ragged``, about equally many.
    Large inputs and models are not stacked on a CPU, and in smaller stacks on a GPU
    (:data:`STACK_VALUES`, :data:`STACK_VALUES_GPU`); fewer than
    :data:`~fedl2p.core.finetuning.batches.FEWEST` clients take less time alone. Some models run one
    client at a time, see :meth:`~fedl2p.core.functional.model.Net.stackable`.
    """
    size = size or net.stack_size
    sizes = [_most(net, d.train.x, size) for d in data]
    order = list(range(len(data)))
    if ragged:
        order.sort(key=lambda i: -len(data[i].train.x))
    keys = [(i // size, _kind(data[i]) if ragged else _shapes(data[i])) for i in order]
    for members in _equal(keys, [sizes[i] for i in order]):
        own = [order[i] for i in members]
        yield from [own] if together(len(own), net.device) else [[i] for i in own]


def _most(net: Net, x: Tensor, size: int) -> int:
    """Return how many clients with inputs like ``x``, of shape (n, ...), a stack may have."""
    values = max(1, x[:1].numel())
    if net.device.type != "cpu":
        most = max(1, min(size, STACK_VALUES_GPU // values))
    else:
        most = size if net.small and values <= STACK_VALUES else 1
    net.examine(x)
    return most if most > 1 and net.stackable(x) else 1


def _equal(keys: Sequence[Hashable], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Group equal keys; the first of a group says how many of it go together."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        size = sizes[members[0]]
        for begin in range(0, len(members), size):
            yield members[begin : begin + size]


def _shapes(data: ClientData) -> Hashable:
    validation = None if data.validation is None else data.validation.x.shape
    return data.train.x.shape, validation


def _kind(data: ClientData) -> Hashable:
    return data.train.x.shape[1:], data.validation is None


def in_order(count: int, parts: Iterator[tuple[list[int], list[T]]]) -> list[T]:
    """Put the results of stacks back into the order of the clients."""
    placed: dict[int, T] = {}
    for positions, results in parts:
        placed.update(zip(positions, results, strict=True))
    return [placed[i] for i in range(count)]


def over_stacks(
    net: Net,
    data: Sequence[ClientData],
    work: Callable[[list[int]], list[T]],
    *,
    size: int | None = None,
    ragged: bool = False,
) -> list[T]:
    """Run ``work`` on every stack of clients and return one result per client, in order.

    ``ragged`` tells that ``work`` takes clients with unequally many examples.

    Several stacks of a small model on a CPU run side by side in as many threads as torch may use
    (``torch.get_num_threads``), each then computing with one thread: small operations do not scale
    by themselves. So ``work`` must be safe to call from threads. How the clients are cut does not
    depend on the number of threads, and a stack computes the same wherever it runs.
    """
    cut = list(stacks(net, data, size=size, ragged=ragged))
    workers = min(torch.get_num_threads(), len(cut)) if _small(net, data) else 1
    if workers < 2 or net.device.type != "cpu" or torch.is_inference_mode_enabled():
        return in_order(len(data), ((s, work(s)) for s in cut))
    grad = torch.is_grad_enabled()

    def alone(members: list[int]) -> list[T]:
        torch.set_num_threads(1)
        with torch.set_grad_enabled(grad):
            return work(members)

    threads = torch.get_num_threads()
    try:
        return in_order(len(data), zip(cut, _pool(workers).map(alone, cut), strict=True))
    finally:
        # torch keeps a number per thread and a global one, which the workers have set too
        torch.set_num_threads(threads)


def _small(net: Net, data: Sequence[ClientData]) -> bool:
    """Tell whether stacks may run side by side.

    Those of a large model would take the memory of so many models and activations at a time, and
    its operations fill the cores by themselves.
    """
    inputs = (_most(net, d.train.x, net.stack_size) for d in data)
    return net.small and all(most > 1 for most in inputs)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Return the threads for stacks; kept, since every net has a copy of its model per thread."""
    return ThreadPoolExecutor(workers, thread_name_prefix="fedl2p-stack")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@torch.no_grad()
def evaluate(
    net: Net, state: NetState, mix: Tensor, examples: Sequence[Examples], *, chunk: int = 512
) -> list[tuple[float, float]]:
    """Return loss (nats) and accuracy (fraction) of each of C clients in evaluation mode.

    Parameters
    ----------
    state, mix
        Of C clients.
    examples
        One part per client; the parts may differ in length. Scores without examples are NaN.
    chunk
        Examples per client and forward pass.
    """
    results: list[tuple[list[int], list[tuple[float, float]]]] = []
    sizes = [_most(net, e.x, net.stack_size) for e in examples]
    chunks = [i // net.stack_size for i in range(len(examples))]
    keys = [(chunk, e.x.shape) for chunk, e in zip(chunks, examples, strict=True)]
    for members in _equal(keys, sizes):
        if len(examples[members[0]].y) == 0:
            results.append((members, [(nan, nan)] * len(members)))
            continue
        own = NetState(
            {k: v[members] for k, v in state.params.items()},
            {k: v[members] for k, v in state.stats.items()},
        )
        x = torch.stack([examples[i].x for i in members]).to(net.device)
        y = torch.stack([examples[i].y for i in members]).to(net.device)
        losses, rights = [], []
        for begin in range(0, y.shape[1], chunk):
            part = slice(begin, begin + chunk)
            logits, _ = net.logits(own, mix[members], x[:, part], training=False)
            losses.append(cross_entropy(logits, y[:, part]) * len(y[0, part]))
            rights.append((logits.argmax(-1) == y[:, part]).sum(1))
        count = y.shape[1]
        loss, right = torch.stack(losses).sum(0) / count, torch.stack(rights).sum(0) / count
        pairs = zip(loss.tolist(), right.tolist(), strict=True)
        results.append((members, list(pairs)))
    return in_order(len(examples), iter(results))
