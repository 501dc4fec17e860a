"""A population over one pool of examples; each client has some of them, by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedl2p.core.clientdata import Augment, ClientData, Examples
from fedl2p.data.pools.client_cache import KEEP_BYTES, ClientCache
from fedl2p.data.pools.client_indices import ClientIndices
from fedl2p.data.pools.partition import label_entropy
from fedl2p.data.population import Population

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Standardisation of uint8 pixels: (x / 255 - mean) / sd, per channel.

    Parameters
    ----------
    mean, sd
        One per channel, of pixels in [0, 1].
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]

    def __call__(self, x: np.ndarray) -> Tensor:
        """Map uint8 images (n, channels, height, width) to float32."""
        # A copy: the mapped file is read-only.
        pixels = torch.from_numpy(np.array(x)).to(torch.float32).div_(255)
        return pixels.sub_(_per_channel(self.mean)).div_(_per_channel(self.sd))

    @property
    def black(self) -> tuple[float, ...]:
        """The value of a black pixel, per channel."""
        return tuple(-m / s for m, s in zip(self.mean, self.sd, strict=True))


class SharedPool(Population):
    """A population over one pool of examples; a client's examples are copied when it is opened.

    Parameters
    ----------
    x
        All examples, e.g. memory-mapped.
    labels
        Shape (n,), int64.
    seen, unseen
        The indices of every client by name, in order.
    classes
        Number of classes.
    prepare
        Converts rows of ``x`` to a client's input tensor.
    augment
        Applied to training batches.
    keep_bytes
        Most bytes of opened clients that are kept.
    open_pretraining
        Opens the population that the global model is pre-trained on; None for this one.
    """

    def __init__(
        self,
        x: np.ndarray,
        labels: Tensor,
        *,
        seen: Mapping[str, ClientIndices],
        unseen: Mapping[str, ClientIndices],
        classes: int,
        prepare: Callable[[np.ndarray], Tensor],
        augment: Augment | None = None,
        keep_bytes: int = KEEP_BYTES,
        open_pretraining: Callable[[], Population] | None = None,
    ) -> None:
        self.seen, self.unseen = tuple(seen), tuple(unseen)
        self.classes = classes
        self.indices = {**seen, **unseen}
        self._x, self._labels = x, labels
        self._prepare, self._augment = prepare, augment
        self._open_pretraining = open_pretraining
        self._opened = ClientCache(self._load, keep_bytes=keep_bytes)
        self.shape = tuple(prepare(x[:1]).shape[1:])

    def open(self, name: str) -> ClientData:
        """Return the data of one client."""
        self._check(name)
        return self._opened(name)

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return the client's description, and entropy (nats) and mode of its training labels."""
        self._check(name)
        indices = self.indices[name]
        labels = self._labels[indices.train]
        return {
            **indices.about,
            "label_entropy": round(label_entropy(labels), 4),
            "top_label": int(torch.bincount(labels).argmax()),
        }

    def pretraining(self) -> Population | None:
        """Return the population that the global model is pre-trained on; None for this one."""
        return self._open_pretraining() if self._open_pretraining else None

    def _load(self, name: str) -> ClientData:
        indices = self.indices[name]
        return ClientData(
            self._examples(indices.train),
            self._examples(indices.validation),
            self._examples(indices.test),
            self._augment,
        )

    def _examples(self, positions: Tensor) -> Examples:
        # Read in the order of the file, for few disk seeks; then put into the client's order.
        order = positions.argsort()
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order))
        x = self._prepare(self._x[positions[order].numpy()])
        return Examples(x[rows], self._labels[positions])

    def _check(self, name: str) -> None:
        if name not in self.indices:
            raise KeyError(
                f"there is no client {name!r}; their names are {self.names[0]} to {self.names[-1]}"
            )


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
