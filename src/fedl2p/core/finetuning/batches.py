"""The batches of inner steps, drawn by index from examples that stay where they are.

Shapes: C clients of a stack, b examples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedl2p.core import trees
from fedl2p.core.clientdata import Augment, Examples, class_balance
from fedl2p.core.trees import Tree
from fedl2p.seeds import derive_seed, generator


class Batches(Protocol):
    """The batches of C clients' inner steps, each (x, y) of shapes (C, b, ...)."""

    def __len__(self) -> int:
        """Return the number of inner steps."""

    def __getitem__(self, step: int, /) -> tuple[Tree, Tree]:
        """Return the batch of a step; the same one at every call."""


@dataclass(frozen=True)
class StackBatch:
    """One batch of those clients of a stack that take a step together.

    Parameters
    ----------
    x, y
        Trees of tensors of shapes (c, b, ...).
    members
        Positions of the c clients in the stack; None for all of them in order.
    dropout_seed
        Seed of dropout's masks, of a client that is alone.
    """

    x: Tree
    y: Tree
    members: tuple[int, ...] | None = None
    dropout_seed: int = 0

    @property
    def clients(self) -> int:
        """The number of clients, c."""
        return trees.length(self.y)

    @property
    def length(self) -> int:
        """The number of examples of each client, b."""
        return trees.first_leaf(self.y).shape[1]


Align = Literal["epochs", "end"]
"""What clients of a stack that take unequally many steps share: the beginnings of epochs, or the
last step."""


class EpochBatches:
    """Batches of a stack of clients, drawn by index; never padded.

    Clients may have unequally many examples. At each step of the stack those whose batches have
    equal lengths go together, and those without a batch wait (:meth:`step_batches`).

    Parameters
    ----------
    examples
        One per client, n_c of equal shape.
    seeds
        One per client; the order of its batches depends on it alone.
    epochs, batch_size
        As in :class:`~fedl2p.core.settings.InnerLoop`.
    augment
        One per client, applied to its batches; None for none.
    raw
        One per client: what its augment takes instead of the examples' ``x``; None for ``x``.
    balanced
        One per client, as in :class:`~fedl2p.core.clientdata.ClientData`; none for all False.
    align
        Which of their steps clients take together, see :data:`Align`.
    fewest
        Fewer clients with batches of equal length take their steps one by one.
    """

    def __init__(
        self,
        examples: Sequence[Examples],
        seeds: Sequence[int],
        *,
        epochs: int,
        batch_size: int,
        augment: Sequence[Augment | None] = (),
        raw: Sequence[Tensor | None] = (),
        balanced: Sequence[bool] = (),
        align: Align = "epochs",
        fewest: int = 1,
    ) -> None:
        self._fewest = fewest
        self._counts = [e.num for e in examples]
        self._examples = list(examples)
        # one after another; a client that is in the stack several times (a search) is stored once
        first_rows: dict[tuple[int, int], int] = {}
        distinct: list[Examples] = []
        for e in examples:
            if (id(e.x), id(e.y)) not in first_rows:
                first_rows[id(e.x), id(e.y)] = sum(d.num for d in distinct)
                distinct.append(e)
        self._x = distinct[0].x if len(distinct) == 1 else trees.cat([e.x for e in distinct])
        self._y = distinct[0].y if len(distinct) == 1 else trees.cat([e.y for e in distinct])
        self._device = trees.first_leaf(self._y).device
        self._first_rows = [first_rows[id(e.x), id(e.y)] for e in examples]
        self.seeds = tuple(seeds)
        self._size = batch_size
        self._augment = list(augment) if any(augment) else []
        self._raw = list(raw) or [None] * len(examples)
        self._balanced = list(balanced) or [False] * len(examples)
        self._per_epoch = [-(-n // batch_size) for n in self._counts]
        self._steps = epochs * self.per_epoch
        self._first_steps = [0] * len(examples)
        if align == "end":
            self._first_steps = [epochs * (self.per_epoch - n) for n in self._per_epoch]
        self._align = align
        self.unequal_sizes = len(set(self._counts)) > 1
        self._orders: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        """Return the number of steps: epochs x batches per epoch, of the client with most."""
        return self._steps

    @property
    def per_epoch(self) -> int:
        """Batches per epoch, of the client with most."""
        return max(self._per_epoch)

    @property
    def most_rows(self) -> int:
        """The examples of a step at which every client has its longest batch."""
        return sum(min(self._size, n) for n in self._counts)

    def __iter__(self) -> Iterator[tuple[Tree, Tree]]:
        """Yield the batches of the inner steps, and no further ones."""
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> tuple[Tree, Tree]:
        """Return the batch of a step; steps beyond the last go on with further epochs.

        Raises
        ------
        ValueError
            If the clients do not all have one of equal length, see :meth:`step_batches`.
        """
        batches = self.step_batches(step)
        if len(batches) > 1 or batches[0].members is not None:
            raise ValueError("these clients have unequally many examples; take step_batches(step)")
        return batches[0].x, batches[0].y

    def step_batches(self, step: int) -> list[StackBatch]:
        """Return the batches of a step: those of equal length together, longest first.

        Too few of equal length (``fewest``) go one by one.
        """
        if not self.unequal_sizes:
            x, y = self._batch(range(len(self._counts)), [step] * len(self._counts))
            return [StackBatch(x, y, dropout_seed=dropout_seed_of(self, step))]
        groups: dict[int, list[tuple[int, int]]] = {}
        for client, (count, k) in enumerate(
            zip(self._counts, self._client_steps(step), strict=True)
        ):
            if k is not None:
                position = k % self._per_epoch[client]
                length = min(self._size, count - position * self._size)
                groups.setdefault(length, []).append((client, k))
        batches = []
        for _, group in sorted(groups.items(), reverse=True):
            whole = len(group) == len(self._counts) or len(group) >= self._fewest
            for pairs in [group] if whole else [[pair] for pair in group]:
                members = tuple(client for client, _ in pairs)
                x, y = self._batch(members, [k for _, k in pairs])
                everybody = len(members) == len(self._counts)
                batches.append(StackBatch(x, y, None if everybody else members))
        return batches

    def _client_steps(self, step: int) -> list[int | None]:
        """Return the number of each client's own step at a step of the stack; None if it waits."""
        if self._align == "end":
            return [step - first if step >= first else None for first in self._first_steps]
        epoch, position = divmod(step, self.per_epoch)
        return [epoch * n + position if position < n else None for n in self._per_epoch]

    def _batch(self, clients: Sequence[int], steps: Sequence[int]) -> tuple[Tree, Tree]:
        """Return the batches, of equal length, of clients at one of their own steps each."""
        rows = torch.stack([self._rows(c, s) for c, s in zip(clients, steps, strict=True)])
        x, y = trees.rows(self._x, rows), trees.rows(self._y, rows)
        if self._augment:
            x = self._augmented(clients, steps, x, rows)
        return x, y

    def _rows(self, client: int, step: int) -> Tensor:
        epoch, position = divmod(step, self._per_epoch[client])
        return self._order(client, epoch)[position * self._size : (position + 1) * self._size]

    def _order(self, client: int, epoch: int) -> Tensor:
        """Return the order of a client's examples in an epoch, as rows of all examples."""
        key = (client, epoch)
        if key not in self._orders:
            order = self._draw_order(client, generator(self.seeds[client], "order", epoch))
            self._orders[key] = (order + self._first_rows[client]).to(self._device)
        return self._orders[key]

    def _draw_order(self, client: int, rng: torch.Generator) -> Tensor:
        n = self._counts[client]
        if not self._balanced[client]:
            return torch.randperm(n, generator=rng)
        labels = self._examples[client].y
        assert isinstance(labels, Tensor)
        ends = class_balance(labels.cpu()).cumsum(0)
        uniform = torch.rand(n, generator=rng, dtype=torch.float64)
        return torch.searchsorted(ends, uniform * ends[-1], right=True).clamp(max=n - 1)

    def _augmented(
        self, clients: Sequence[int], steps: Sequence[int], x: Tree, rows: Tensor
    ) -> Tree:
        """Return each client's batch, augmented.

        A client that is in the stack several times with one seed (a search that tries many settings
        on it) is augmented once.
        """
        done: dict[tuple[int, ...], Tree] = {}
        batches: list[Tree] = []
        for i, (c, step) in enumerate(zip(clients, steps, strict=True)):
            augment = self._augment[c]
            if augment is None:
                batches.append(trees.rows(x, i))
                continue
            raw = self._raw[c]
            source = self._examples[c].x if raw is None else raw
            place = trees.first_leaf(source).data_ptr()
            key = (id(augment), place, self._balanced[c], self.seeds[c], step)
            if key not in done:
                # a generator per step, not per run: a step can be computed again (checkpointing)
                rng = generator(self.seeds[c], "augment", step)
                done[key] = augment(
                    trees.rows(x, i) if raw is None else raw[rows[i] - self._first_rows[c]], rng
                )
            batches.append(done[key])
        return trees.stack(batches)


def step_batches(batches: Batches, step: int) -> list[StackBatch]:
    """Return the batches of a step, one for each group of clients that take it together."""
    if isinstance(batches, EpochBatches):
        return batches.step_batches(step)
    x, y = batches[step]
    return [StackBatch(x, y, dropout_seed=dropout_seed_of(batches, step))]


def dropout_seed_of(batches: Batches, step: int) -> int:
    """Return the seed of a step's dropout masks: by client and step, the same at every call."""
    seeds = batches.seeds if isinstance(batches, EpochBatches) else ()
    return derive_seed("noise", *seeds, step)
