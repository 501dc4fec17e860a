"""The batches of inner steps, drawn by index from examples that stay where they are.

Shapes: C clients, b examples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedl2p.core.clientdata import Augment, Examples, class_balance
from fedl2p.seeds import derive_seed, generator


class Batches(Protocol):
    """The batches of C clients' inner steps, each (x, y) of shapes (C, b, ...) and (C, b)."""

    def __len__(self) -> int:
        """Return the number of inner steps."""

    def __getitem__(self, step: int, /) -> tuple[Tensor, Tensor]:
        """Return the batch of a step; the same one at every call."""


class EpochBatches:
    """Batches of a cohort whose clients hold equally many examples, drawn by index.

    Parameters
    ----------
    examples
        One per client, all of the same length n.
    seeds
        One per client; the order of its batches depends on it alone.
    epochs, batch_size
        As in :class:`InnerLoop`.
    augment
        One per client, applied to its batches; None for none.
    raw
        One per client: what its augment takes instead of the examples' ``x``; None for ``x``.
    balanced
        One per client, as in :class:`~fedl2p.core.clientdata.ClientData`; none for all False.
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
    ) -> None:
        self._sources = [e.x for e in examples]
        self._x = torch.stack(self._sources)
        self._y = torch.stack([e.y for e in examples])
        self.seeds = tuple(seeds)
        self._size = batch_size
        self._augment = list(augment) if any(augment) else []
        self._raw = list(raw) or [None] * len(examples)
        self._balanced = list(balanced) or [False] * len(examples)
        self._per_epoch = -(-self._x.shape[1] // batch_size)
        self._steps = epochs * self._per_epoch
        self._orders: dict[int, Tensor] = {}
        self._rows = torch.arange(len(examples), device=self._x.device).unsqueeze(1)

    def __len__(self) -> int:
        """Return epochs x batches per epoch."""
        return self._steps

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return self._per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the inner steps, and no further ones."""
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step; steps beyond the last go on with further epochs."""
        epoch, position = divmod(step, self._per_epoch)
        chosen = self._order(epoch)[:, position * self._size : (position + 1) * self._size]
        x, y = self._x[self._rows, chosen], self._y[self._rows, chosen]
        if self._augment:
            x = self._augmented(step, x, chosen)
        return x, y

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            drawn = [self._drawn(c, generator(s, "order", epoch)) for c, s in enumerate(self.seeds)]
            self._orders[epoch] = torch.stack(drawn).to(self._x.device)
        return self._orders[epoch]

    def _drawn(self, client: int, rng: torch.Generator) -> Tensor:
        n = self._x.shape[1]
        if not self._balanced[client]:
            return torch.randperm(n, generator=rng)
        ends = class_balance(self._y[client].cpu()).cumsum(0)
        uniform = torch.rand(n, generator=rng, dtype=torch.float64)
        return torch.searchsorted(ends, uniform * ends[-1], right=True).clamp(max=n - 1)

    def _augmented(self, step: int, x: Tensor, chosen: Tensor) -> Tensor:
        """Return each client's batch, augmented.

        A client that is in the stack several times with one seed (a search that tries many settings
        on it) is augmented once.
        """
        done: dict[tuple[int, ...], Tensor] = {}
        batches = []
        for c, augment in enumerate(self._augment):
            if augment is None:
                batches.append(x[c])
                continue
            raw = self._raw[c]
            source = self._sources[c] if raw is None else raw
            key = (id(augment), source.data_ptr(), self._balanced[c], self.seeds[c])
            if key not in done:
                # a generator per step, not per run: a step can be computed again (checkpointing)
                rng = generator(self.seeds[c], "augment", step)
                done[key] = augment(x[c] if raw is None else raw[chosen[c]], rng)
            batches.append(done[key])
        return torch.stack(batches)


def noise_of(batches: Batches, step: int) -> int:
    """Return the seed of a step's dropout masks: by client and step, the same at every call."""
    seeds = batches.seeds if isinstance(batches, EpochBatches) else ()
    return derive_seed("noise", *seeds, step)
