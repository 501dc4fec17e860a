"""Clients that hold examples of one shared pool, by position: how every large data set is dealt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedl2p.core.clientdata import Augment, ClientData, Examples
from fedl2p.data.pools.dealing import Holding
from fedl2p.data.pools.opened import KEEP_BYTES, Opened
from fedl2p.data.pools.partition import label_entropy
from fedl2p.data.population import Population


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Bytes to standardised numbers: (x / 255 - mean) / sd, per channel.

    Parameters
    ----------
    mean, sd
        One per channel, of pixels in [0, 1].
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]

    def __call__(self, x: np.ndarray) -> Tensor:
        """Map uint8 images (n, channels, height, width) to float32."""
        # a copy: what is mapped is read-only
        pixels = torch.from_numpy(np.array(x)).to(torch.float32).div_(255)
        return pixels.sub_(_per_channel(self.mean)).div_(_per_channel(self.sd))

    @property
    def black(self) -> tuple[float, ...]:
        """The value of a black pixel, per channel."""
        return tuple(-m / s for m, s in zip(self.mean, self.sd, strict=True))


class SharedPool(Population):
    """A population over one pool of examples; a client's own are copied when it is opened.

    Parameters
    ----------
    x
        All examples, e.g. memory-mapped.
    labels
        Shape (n,), int64.
    seen, unseen
        Every client's holding by name, in order.
    classes
        Number of classes.
    prepare
        Makes the tensor of a client's examples from their rows of ``x``.
    augment
        Applied to its training batches.
    keep_bytes
        Most bytes of opened clients kept.
    """

    def __init__(
        self,
        x: np.ndarray,
        labels: Tensor,
        *,
        seen: Mapping[str, Holding],
        unseen: Mapping[str, Holding],
        classes: int,
        prepare: Callable[[np.ndarray], Tensor],
        augment: Augment | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self.seen, self.unseen = tuple(seen), tuple(unseen)
        self.classes = classes
        self.holdings = {**seen, **unseen}
        self._x, self._labels = x, labels
        self._prepare, self._augment = prepare, augment
        self._opened = Opened(self._make, keep_bytes=keep_bytes)
        self.shape = tuple(prepare(x[:1]).shape[1:])

    def open(self, name: str) -> ClientData:
        """Return the data of one client."""
        self._check(name)
        return self._opened(name)

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return what the holding says, and entropy (nats) and mode of the training labels."""
        self._check(name)
        holding = self.holdings[name]
        labels = self._labels[holding.train]
        return {
            **holding.about,
            "label_entropy": round(label_entropy(labels), 4),
            "top_label": int(torch.bincount(labels).argmax()),
        }

    def _make(self, name: str) -> ClientData:
        holding = self.holdings[name]
        return ClientData(
            self._examples(holding.train),
            self._examples(holding.validation),
            self._examples(holding.test),
            self._augment,
        )

    def _examples(self, positions: Tensor) -> Examples:
        # In the file's order, which spares a disk its seeks, and back into the client's.
        order = positions.argsort()
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order))
        x = self._prepare(self._x[positions[order].numpy()])
        return Examples(x[rows], self._labels[positions])

    def _check(self, name: str) -> None:
        if name not in self.holdings:
            raise KeyError(
                f"there is no client {name!r}; they are called {self.names[0]} to {self.names[-1]}"
            )


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
