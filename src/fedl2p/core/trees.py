"""Trees of tensors: a tensor, or a dictionary or tuple of such, with a common first dimension.

A batch of inputs, and one of targets, is such a tree. A single tensor takes no longer than without.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

# Text, so that sources can be imported without loading torch.
Tree: TypeAlias = "Tensor | dict[str, Tree] | tuple[Tree, ...]"


def map_tree(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Return the tree of a function's values at the tensors."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {k: map_tree(function, v) for k, v in tree.items()}
    return tuple(map_tree(function, v) for v in tree)


def leaves(tree: Tree) -> Iterator[Tensor]:
    """Yield the tensors."""
    if isinstance(tree, torch.Tensor):
        yield tree
        return
    for child in tree.values() if isinstance(tree, dict) else tree:
        yield from leaves(child)


def named_leaves(tree: Tree, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with their names: ``['key']`` of a dictionary, ``[0]`` of a tuple."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
        return
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from named_leaves(child, f"{name}[{key!r}]")


def first_leaf(tree: Tree) -> Tensor:
    """Return the first tensor."""
    return tree if isinstance(tree, torch.Tensor) else next(leaves(tree))


def length(tree: Tree) -> int:
    """Return the size of the first dimension."""
    return len(first_leaf(tree))


def rows(tree: Tree, index: Tensor | slice | int) -> Tree:
    """Return the rows of every tensor."""
    if isinstance(tree, torch.Tensor):
        return tree[index]
    return map_tree(lambda t: t[index], tree)


def split(tree: Tree, size: int, dim: int = 0) -> Sequence[Tree]:
    """Return the tree in pieces of ``size`` along a dimension; the last one may be smaller."""
    if isinstance(tree, torch.Tensor):
        return list(torch.split(tree, size, dim))
    total = first_leaf(tree).shape[dim]
    return [
        _narrowed(tree, dim, begin, min(size, total - begin)) for begin in range(0, total, size)
    ]


def _narrowed(tree: Tree, dim: int, begin: int, size: int) -> Tree:
    return map_tree(lambda t: t.narrow(dim, begin, size), tree)


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees of one structure along a new first dimension."""
    return _joined(torch.stack, trees)


def cat(trees: Sequence[Tree]) -> Tree:
    """Concatenate trees of one structure along the first dimension."""
    return _joined(torch.cat, trees)


def _joined(join: Callable[[list[Tensor]], Tensor], trees: Sequence[Tree]) -> Tree:
    first = trees[0]
    if isinstance(first, torch.Tensor):
        return join([t for t in trees if isinstance(t, torch.Tensor)])
    if isinstance(first, dict):
        return {k: _joined(join, [t[k] for t in trees if isinstance(t, dict)]) for k in first}
    children = zip(*(t for t in trees if isinstance(t, tuple)), strict=True)
    return tuple(_joined(join, many) for many in children)


def to_device(tree: Tree, device: torch.device | str) -> Tree:
    """Return the tree on another device."""
    return map_tree(lambda t: t.to(device), tree)


def clone(tree: Tree) -> Tree:
    """Return a copy of every tensor."""
    return map_tree(lambda t: t.clone(), tree)


def kind(tree: Tree, *, skip: int = 1) -> Hashable:
    """Return structure, shapes without the first ``skip`` dimensions, and dtypes."""
    if isinstance(tree, torch.Tensor):
        return tree.shape[skip:], tree.dtype
    if isinstance(tree, dict):
        return tuple((k, kind(v, skip=skip)) for k, v in tree.items())
    return tuple(kind(v, skip=skip) for v in tree)


def call(module: nn.Module, inputs: Tree) -> Any:
    """Return ``module(x)``, ``module(**x)`` for a dictionary, ``module(*x)`` for a tuple."""
    if isinstance(inputs, torch.Tensor):
        return module(inputs)
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def describe(tree: Tree) -> str:
    """Return shapes and dtypes for a message: ``(32, 3, 8, 8) float32``."""
    if isinstance(tree, torch.Tensor):
        return f"{tuple(tree.shape)} {str(tree.dtype).removeprefix('torch.')}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in tree.items()) + "}"
    return "(" + ", ".join(map(describe, tree)) + ")"
