"""The groups of a client's profile: names and units of their entries, and how the nets read them.

A profile holds plain values. The default form of the meta-nets reads them on scales on which
entries of clients lie around 0 and are about 1 in size, by formulas that are the same for everybody
(an average over clients would reveal profiles). Larger ones let the nets' first steps go too far:
the rates of some clients then ran off.

=========== ==================================== ===================================
group       entries                              read as
=========== ==================================== ===================================
divergences nats, one per norm                   ``log(0.001 + x) + 1.5``
moments     mean and deviation, two per layer    as they are
gradients   gradient / weight, one per tensor    ``log(0.001 + x) / 2``
loss        mean loss; accuracy in [0, 1]        ``log(0.001 + x) / 2``; ``2 x - 1``
labels      entropy in nats; number of classes;  ``x - 1.5``; ``log(x) - 1.5``;
            agreement in [0, 1]                  ``4 x - 2``
size        number of examples                   ``log(x) / 2 - 2``
=========== ==================================== ===================================

The number that is added before a logarithm is what counts as none: a loss of 0, a tensor without a
gradient. A loss below 0, which only a function of the user's has, is read as 0; no classes, as one.

Gradients relative to weights are the criterion of Auto-RGN for what to fine-tune and how fast (Lee,
Chen, Tajwar, Kumar, Yao, Liang, Finn, "Surgical Fine-Tuning Improves Adaptation to Distribution
Shifts", ICLR 2023, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedl2p.core.settings import ProfileGroup
from fedl2p.core.sites import Sites


@dataclass(frozen=True)
class Group:
    """One group of entries.

    Parameters
    ----------
    field
        Its field in a :class:`~fedl2p.core.profiles.Profile`.
    names
        Returns the entries' names, for a model.
    units
        Of the entries, in turn, with a leading space; none for numbers without a unit.
    as_read
        What the default form of the nets reads, elementwise, of entries (..., E).
    """

    field: str
    names: Callable[[Sites], tuple[str, ...]]
    units: tuple[str, ...]
    as_read: Callable[[Tensor], Tensor]

    def unit(self, entry: int) -> str:
        """Return the unit of an entry."""
        return self.units[entry % len(self.units)]


def _loss_as_read(x: Tensor) -> Tensor:
    loss, accuracy = x.unbind(-1)
    return torch.stack([(loss.clamp_min(0) + 1e-3).log() / 2, 2 * accuracy - 1], -1)


def _labels_as_read(x: Tensor) -> Tensor:
    entropy, classes, agreement = x.unbind(-1)
    return torch.stack([entropy - 1.5, classes.clamp_min(1).log() - 1.5, 4 * agreement - 2], -1)


GROUPS: Mapping[ProfileGroup, Group] = {
    "divergences": Group(
        "divergence",
        lambda sites: tuple(f"divergence of {name}" for name in sites.norms),
        (" nats",),
        lambda x: (x + 1e-3).log() + 1.5,
    ),
    "moments": Group(
        "moments",
        lambda sites: tuple(
            f"input {what} of {name}" for name in sites.layers for what in ("mean", "sd")
        ),
        ("",),
        lambda x: x,
    ),
    "gradients": Group(
        "gradients",
        lambda sites: tuple(f"relative gradient of {name}" for name in sites.params),
        ("",),
        lambda x: (x + 1e-3).log() / 2,
    ),
    "loss": Group(
        "loss",
        lambda _: ("global model's loss", "global model's accuracy"),
        ("",),
        _loss_as_read,
    ),
    "labels": Group(
        "labels",
        lambda _: ("label entropy", "number of classes", "label agreement"),
        (" nats", "", ""),
        _labels_as_read,
    ),
    "size": Group(
        "size",
        lambda _: ("number of examples",),
        ("",),
        lambda x: x.log() / 2 - 2,
    ),
}
"""All groups, in the order in which the nets read them."""
