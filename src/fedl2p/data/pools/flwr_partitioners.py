"""Partitioners of flwr_datasets (https://flower.ai/docs/datasets), written as calls in Python."""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedl2p.data.files.folders import needs

if TYPE_CHECKING:
    import datasets
    from flwr_datasets.partitioner import Partitioner
    from torch import Tensor

ROW = "fedl2p row"
"""Column with the position of each example, which partitioning keeps."""


def parse_partitioner(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return class name and arguments of a partitioner written as a call in Python.

    Raises
    ------
    ValueError
        If it is not a call with literal arguments.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("it is no call")
        args = [ast.literal_eval(arg) for arg in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        if len(named) != len(call.keywords):
            raise ValueError("** has no place in it")
        return call.func.id, args, named
    except (ValueError, SyntaxError, MemoryError, RecursionError) as problem:
        raise ValueError(
            f"partitioner {text!r} cannot be read ({problem}); write a class of flwr_datasets and "
            "its arguments, e.g. DirichletPartitioner(num_partitions=20, partition_by='label', "
            "alpha=0.5)"
        ) from None


def make_partitioner(text: str, seed: int) -> Partitioner:
    """Return the partitioner; ``seed`` is its seed unless the text names one.

    Raises
    ------
    ValueError
        If there is no such class, or it does not take these arguments.
    """
    with needs("flwr_datasets"):
        from flwr_datasets import partitioner as known
    name, args, named = parse_partitioner(text)
    names = [n for n in known.__all__ if n != "Partitioner" and not n.startswith("Vertical")]
    if name not in names:
        raise ValueError(f"there is no partitioner {name!r}; there are {', '.join(names)}")
    kind = getattr(known, name)
    if "seed" in inspect.signature(kind).parameters:
        named = {"seed": seed, **named}
    try:
        made: Partitioner = kind(*args, **named)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"partitioner {text!r} cannot be made: {problem}") from None
    return made


def partition(table: datasets.Dataset, text: str, seed: int) -> list[Tensor]:
    """Return the positions of every client's examples under a partitioner.

    Raises
    ------
    ValueError
        If the partitioner does not fit this data set.
    """
    partitioner = make_partitioner(text, seed)
    partitioner.dataset = table.add_column(ROW, np.arange(len(table)))
    try:
        parts = [
            list(partitioner.load_partition(i)[ROW]) for i in range(partitioner.num_partitions)
        ]
    except (ValueError, KeyError, TypeError, IndexError) as problem:
        why = " ".join(str(problem).split())
        raise ValueError(f"partitioner {text!r} cannot deal out the data set: {why}") from None
    return [torch.tensor(part, dtype=torch.int64) for part in parts]
