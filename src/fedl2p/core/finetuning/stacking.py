"""Many clients in one call: stacked where their shapes agree, one after another where not.

The clients of a call are cut by position into chunks of ``stack_size``
(:class:`~fedl2p.core.settings.Compute`), and only within a chunk into stacks: so whoever calls with
whole chunks, in one call or in several, gets the same stacks. Within a stack every tensor has a
leading client dimension and the model runs under vmap.

The clients of a stack have equally many examples or, where the work can do with that, unequally
many, sorted by their number; at each step those whose batches have equal lengths go together, so
that no batch is padded (:class:`~fedl2p.core.finetuning.batches.EpochBatches`). A client alone runs
without vmap. The results are the same up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

from fedl2p.core import trees
from fedl2p.core.clientdata import ClientData
from fedl2p.core.finetuning.stack_timing import stacks_pay
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.trees import Tree

STACK_VALUES = 2_000
"""Input values of one example up to which clients may be stacked, or run side by side in threads,
on a CPU: 16 x 16 pixels in colour, a log-mel of 49 x 40. Larger inputs, and models that are not
small, fill the cores by themselves (``benchmarks/cohorts.py``)."""

FEWEST = 3
"""Clients from which on a stack takes no more time than one by one, on a CPU, where stacks pay."""

STACK_VALUES_GPU = 40_000
"""Input values that one example per client of a stack may have together on a GPU, whatever the
model; a bound to the memory that was not measured on one."""

T = TypeVar("T")


def map_stacks(
    work: Callable[..., Sequence[T]],
    net: FunctionalModel,
    data: Sequence[ClientData],
    *entries: Sequence[Any],
    unequal_sizes: bool = False,
) -> list[T]:
    """Call ``work`` on every stack of clients and return one result per client, in order.

    Parameters
    ----------
    work
        Takes, for each of ``entries``, the list of those of a stack's clients, and returns one
        result for each of these clients. It is called from threads.
    net
        The model that computes.
    data
        The clients' data, by which they are cut into stacks.
    entries
        Sequences with an entry per client.
    unequal_sizes
        Whether ``work`` takes clients with unequally many examples.

    Notes
    -----
    Several stacks of a small model on a CPU run side by side in as many threads as torch may use
    (``torch.get_num_threads``), each then computing with one thread: small operations do not scale
    by themselves. How the clients are cut does not depend on the number of threads, and a stack
    computes the same wherever it runs.
    """
    stacks = list(cut_into_stacks(net, data, unequal_sizes=unequal_sizes))
    calls = [[[entry[i] for i in members] for entry in entries] for members in stacks]
    before, small = torch.get_num_threads(), _may_run_in_threads(net, data)
    done: list[Sequence[T]] = []
    if small and min(before, len(calls)) > 1:
        done = _in_threads(work, calls, min(before, len(calls)))
    else:
        try:
            if small:  # one thread here too: the sums of several differ in the last bits
                torch.set_num_threads(1)
            for call in calls:
                done.append(work(*call))
        finally:
            torch.set_num_threads(before)
    results: dict[int, T] = {}
    for members, of_stack in zip(stacks, done, strict=True):
        results.update(zip(members, of_stack, strict=True))
    return [results[i] for i in range(len(data))]


def cut_into_stacks(
    net: FunctionalModel,
    data: Sequence[ClientData],
    *,
    size: int | None = None,
    unequal_sizes: bool = False,
) -> Iterator[list[int]]:
    """Cut clients into stacks; yield the positions of each stack's clients.

    Large inputs and models are not stacked on a CPU, and in smaller stacks on a GPU
    (:data:`STACK_VALUES`, :data:`STACK_VALUES_GPU`); too few clients take less time alone
    (:func:`fewest_to_stack`). Some models run one client at a time, see
    :meth:`~fedl2p.core.functional.model.FunctionalModel.stackable`.

    Parameters
    ----------
    net, data, unequal_sizes
        As in :func:`map_stacks`.
    size
        Clients of a chunk, and at most of a stack; None for ``net.stack_size``.
    """
    size = size or net.stack_size
    largest = [largest_stack(net, d.train.x, size) for d in data]
    order = list(range(len(data)))
    if unequal_sizes:
        order.sort(key=lambda i: -data[i].train.num)
    keys = [(i // size, _kind(data[i]) if unequal_sizes else _shapes(data[i])) for i in order]
    for positions in grouped(keys, [largest[i] for i in order]):
        members = [order[i] for i in positions]
        pays = len(members) > 1 and len(members) >= fewest_to_stack(net, data[members[0]].train.x)
        yield from [members] if pays else [[i] for i in members]


def largest_stack(net: FunctionalModel, x: Tree, size: int) -> int:
    """Return how many clients with inputs like ``x``, of shape (n, ...), a stack may have."""
    values = max(1, sum(leaf[:1].numel() for leaf in trees.leaves(x)))
    if net.device.type != "cpu":
        largest = max(1, min(size, STACK_VALUES_GPU // values))
    else:
        largest = size if net.small and values <= STACK_VALUES else 1
    net.examine(x)
    return largest if largest > 1 and net.stackable(x) else 1


def fewest_to_stack(net: FunctionalModel, x: Tree) -> int:
    """Return from how many clients with inputs like ``x``, of shape (n, ...), on they are stacked.

    Fewer take less time one by one. More than any stack has, if that is so for all.
    """
    if net.device.type != "cpu":
        return 1
    if largest_stack(net, x, net.stack_size) == 1 or net.stacking == "always":
        return FEWEST
    return FEWEST if stacks_pay(net, x, net.stack_size) else net.stack_size + 1


def grouped(keys: Sequence[Hashable], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Group positions by key; cut each group into pieces of the size of its first position."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        size = sizes[members[0]]
        for begin in range(0, len(members), size):
            yield members[begin : begin + size]


def _shapes(data: ClientData) -> Hashable:
    validation = None if data.validation is None else data.validation.num
    return data.train.num, validation, _kind(data)


def _kind(data: ClientData) -> Hashable:
    # dtypes of one kind may differ from client to client no more than shapes
    return trees.kind(data.train.x), trees.kind(data.train.y), data.validation is None


def _may_run_in_threads(net: FunctionalModel, data: Sequence[ClientData]) -> bool:
    """Tell whether stacks may run side by side.

    Those of a large model would take the memory of so many models and activations at a time, and
    its operations fill the cores by themselves.
    """
    if net.device.type != "cpu" or torch.is_inference_mode_enabled():
        return False
    return net.small and all(largest_stack(net, d.train.x, net.stack_size) > 1 for d in data)


def _in_threads(
    work: Callable[..., Sequence[T]], calls: Sequence[Sequence[Any]], threads: int
) -> list[Sequence[T]]:
    """Do all calls in a pool of threads, each of which computes with one thread of torch."""
    grad, before = torch.is_grad_enabled(), torch.get_num_threads()

    def one(call: Sequence[Any]) -> Sequence[T]:
        torch.set_num_threads(1)
        with torch.set_grad_enabled(grad):
            return work(*call)

    try:
        return list(_pool(threads).map(one, calls))
    finally:
        # torch keeps a number per thread and a global one, which the workers have set too
        torch.set_num_threads(before)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Return the threads for stacks; kept, since every net has a copy of its model per thread."""
    return ThreadPoolExecutor(workers, thread_name_prefix="fedl2p-stack")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
