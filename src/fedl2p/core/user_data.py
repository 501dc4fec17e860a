"""Examples out of what users have: pairs, arrays, data sets, loaders, columns of a table.

Accepted are

- a pair ``(inputs, targets)``. Each is a tensor, an array (anything with ``__array__``, a list of
  numbers), or a dictionary or tuple of these. The model is called as ``model(x)``, ``model(**x)``
  for a dictionary, ``model(*x)`` for a tuple;
- a ``torch.utils.data.Dataset``, a sequence of examples or a ``DataLoader``. It is read once, so
  that random transforms are the same in every epoch (``ClientData.augment`` is drawn anew), under a
  fixed seed. Its examples are pairs, or dictionaries with the targets under "labels" or "label";
- a data set of Hugging Face: its column "labels" or "label" holds the targets, its other columns
  the inputs, by name; a single other column is given by position.

Inputs of dtype uint8 are images and become float32 in [0, 1], divided by 255, wherever they come
from. In a dictionary or tuple only those of three or more dimensions can be images; others of dtype
uint8 are refused. Nothing else is converted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fedl2p.core import trees
from fedl2p.core.trees import Tree

TARGETS = ("labels", "label")
"""Names of targets among named columns."""

_WANTED = (
    "give a pair (inputs, targets), fedl2p.Examples, a torch Dataset or DataLoader, or a data set "
    "of Hugging Face"
)


def read_examples(data: Any, *, what: str = "the data") -> tuple[Tree, Tree]:
    """Return inputs and targets as trees of tensors.

    Parameters
    ----------
    data
        As in the list at the top of this module.
    what
        What to call it in messages.

    Raises
    ------
    ValueError
        In one line that says what came and what is wanted.
    """
    if isinstance(data, tuple):
        return _converted(_pair(data, what), what)
    if isinstance(data, torch.utils.data.DataLoader):
        return _converted(_read(data, _batches_of_loader, trees.cat, what), what)
    if _is_table(data):
        return _converted(_columns(data.with_format("torch")[:], what), what)
    if isinstance(data, Mapping):
        return _converted(_columns(data, what), what)
    if isinstance(data, list) and len(data) == 2 and all(hasattr(p, "__array__") for p in data):
        return _converted(_pair(tuple(data), what), what)
    is_sequence = isinstance(data, Sequence) and not isinstance(data, str | bytes)
    if is_sequence or isinstance(data, torch.utils.data.Dataset):
        return _converted(_read(data, _examples_of, trees.stack, what), what)
    raise ValueError(f"{what}: a {type(data).__name__} came; {_WANTED}")


def _converted(pair: tuple[Tree, Tree], what: str) -> tuple[Tree, Tree]:
    return inputs_of(pair[0], f"{what}, inputs"), pair[1]


def inputs_of(data: Any, what: str = "inputs") -> Tree:
    """Return inputs as a tree of tensors, images scaled to [0, 1]."""
    tree = _tensors(data, what)
    if isinstance(tree, torch.Tensor):
        return tree.to(torch.float32) / 255 if tree.dtype == torch.uint8 else tree
    for name, leaf in trees.named_leaves(tree):
        if leaf.dtype == torch.uint8 and leaf.dim() < 3:
            raise ValueError(
                f"{what}{name}: uint8 of shape {tuple(leaf.shape)} came; uint8 is for images, give "
                "tokens as int64 and masks as bool or int64"
            )
    return trees.map_tree(
        lambda t: t.to(torch.float32) / 255 if t.dtype == torch.uint8 else t, tree
    )


def inputs_of_batch(batch: Any) -> Tree:
    """Return the inputs of a batch: of a pair the first entry, of a dictionary all but targets."""
    if isinstance(batch, tuple | list):
        batch = batch[0]
    if isinstance(batch, Mapping):
        batch = {k: v for k, v in batch.items() if k not in TARGETS}
    return inputs_of(batch)


def targets_of_batch(batch: Any) -> Tree:
    """Return the targets of a batch: of a pair the second entry, of a dictionary those by name."""
    return _pair(batch, "a batch")[1]


def _tensors(data: Any, what: str) -> Tree:
    """Return a tree of tensors out of tensors, arrays, numbers and lists."""
    if isinstance(data, torch.Tensor):
        return data
    if isinstance(data, Mapping | tuple) and not data:
        raise ValueError(f"{what}: an empty {type(data).__name__} came; give at least one tensor")
    if isinstance(data, Mapping):
        return {str(k): _tensors(v, f"{what}[{k!r}]") for k, v in data.items()}
    if isinstance(data, tuple):
        return tuple(_tensors(v, f"{what}[{i}]") for i, v in enumerate(data))
    if not (isinstance(data, list | int | float) or hasattr(data, "__array__")):
        raise ValueError(
            f"{what}: a {type(data).__name__} came; give a tensor, an array, or a dictionary or "
            "tuple of these"
        )
    try:
        if isinstance(data, list) and data and all(isinstance(v, torch.Tensor) for v in data):
            return torch.stack(data)
        array = data if isinstance(data, list | int | float) else data.__array__()
        with warnings.catch_warnings():
            # of arrays that are mapped read-only, which nothing here writes
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what}: no tensor can be made of this {type(data).__name__} "
            f"({' '.join(str(error).split())}); give numbers, in rows of equal length"
        ) from None


def _is_table(data: Any) -> bool:
    """Tell whether this is a data set of Hugging Face, without importing that library."""
    return hasattr(data, "column_names") and hasattr(data, "with_format")


def _columns(columns: Mapping[str, Any], what: str) -> tuple[Tree, Tree]:
    """Return inputs and targets out of named columns, or out of one example of these."""
    name = next((t for t in TARGETS if t in columns), None)
    if name is None or len(columns) == 1:
        raise ValueError(
            f"{what}: there are the columns {', '.join(map(repr, columns))}; name the targets "
            "'labels' or 'label', and have another column for the inputs"
        )
    for column, values in columns.items():
        rows = values if isinstance(values, list) else [values]
        if any(isinstance(v, str) for v in rows):
            raise ValueError(
                f"{what}: column {column!r} holds text; turn it into numbers and remove it "
                "(remove_columns)"
            )
        if len({v.shape for v in rows if isinstance(v, torch.Tensor)}) > 1:
            raise ValueError(
                f"{what}: column {column!r} has rows of unequal shapes; pad them to one"
            )
    inputs = {k: v for k, v in columns.items() if k != name}
    x = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    return _tensors(x, f"{what}, inputs"), _tensors(columns[name], f"{what}, {name}")


def _pair(pair: Any, what: str) -> tuple[Tree, Tree]:
    """Return inputs and targets of a pair, or of a dictionary with both."""
    if isinstance(pair, Mapping):
        return _columns(pair, what)
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        came = (
            f"{len(pair)} parts" if isinstance(pair, tuple | list) else (f"a {type(pair).__name__}")
        )
        raise ValueError(
            f"{what}: {came} came where a pair (inputs, targets) is wanted; give several inputs as "
            "((a, b), targets) or by name, {'name': tensor, 'labels': tensor}"
        )
    return _tensors(pair[0], f"{what}, inputs"), _tensors(pair[1], f"{what}, targets")


def _read(
    data: Any,
    read: Callable[[Any], Iterable[Any]],
    join: Callable[[Sequence[Tree]], Tree],
    what: str,
) -> tuple[Tree, Tree]:
    """Return all examples of a data set; torch's own generator stays as it is."""
    kind = type(data).__name__
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            pairs = [_pair(part, f"{what}, of the {kind}") for part in read(data)]
        except (TypeError, RuntimeError, LookupError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{what}: the {kind} cannot be read ({why}); {_WANTED}") from error
    if not pairs:
        raise ValueError(f"{what}: the {kind} has no examples; give at least one")
    try:
        return join([x for x, _ in pairs]), join([y for _, y in pairs])
    except (RuntimeError, ValueError, LookupError) as error:
        raise ValueError(
            f"{what}: the examples of the {kind} differ in shape "
            f"({' '.join(str(error).split())}); pad or crop them to one"
        ) from None


def _batches_of_loader(loader: Any) -> Iterator[Any]:
    batched = loader.batch_sampler is not None or loader.batch_size is not None
    for batch in loader:
        if isinstance(batch, tuple | list):  # torch collates the tuple of several inputs to a list
            batch = tuple(tuple(part) if isinstance(part, list) else part for part in batch)
        yield batch if batched else _with_batch_dimension(batch)


def _with_batch_dimension(example: Any) -> Any:
    if isinstance(example, Mapping):
        return {k: torch.as_tensor(v)[None] for k, v in example.items()}
    return tuple(trees.map_tree(lambda t: t[None], _tensors(part, "")) for part in example)


def _examples_of(data: Any) -> Iterator[Any]:
    if isinstance(data, torch.utils.data.IterableDataset):
        yield from data
        return
    for i in range(len(data)):  # not every data set ends its iteration
        yield data[i]
