"""Clients of photographs from several domains, over the images of :mod:`..files.fedbn_images`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedl2p.data.files.cache import DecodedExamples
from fedl2p.data.pools.augmentation import FlipAndRotate
from fedl2p.data.pools.client_indices import ClientIndices
from fedl2p.data.pools.partition import stratified_split
from fedl2p.data.pools.shared_pool import Normalise, SharedPool
from fedl2p.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

NORMALISE = Normalise(mean=(0.485, 0.456, 0.406), sd=(0.229, 0.224, 0.225))
"""ImageNet's constants: the initial models were trained on it."""

VALIDATION_SHARE = 0.2


def split_domains(
    pool: DecodedExamples, domains: tuple[str, ...], *, seed: int, name: str
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return the positions of each domain's training, validation and test examples.

    As FedL2P's authors do (NeurIPS 2023, section 4): all domains are cut down, at random, to as
    many training images as the smallest has; these are split 80/20 into training and validation,
    class by class. Test images are all used.

    Raises
    ------
    ValueError
        If a domain has too few images to split.
    """
    label = torch.from_numpy(pool.column("label"))
    domain, is_test = pool.column("domain"), pool.column("test") == 1
    train = [np.flatnonzero((domain == d) & ~is_test) for d in range(len(domains))]
    smallest = min(map(len, train))
    parts = {}
    for number, (group, positions) in enumerate(zip(domains, train, strict=True)):
        order = torch.randperm(len(positions), generator=generator(seed, name, group, "equal"))
        kept = torch.from_numpy(positions)[order[:smallest]]
        shares = (1 - VALIDATION_SHARE, VALIDATION_SHARE)
        first, second = stratified_split(
            label[kept], shares, generator=generator(seed, name, group, "validation")
        )
        tests = torch.from_numpy(np.flatnonzero((domain == number) & is_test))
        if not (len(first) and len(second) and len(tests)):
            raise ValueError(
                f"{group} has {len(kept)} training and {len(tests)} test images, too few to split "
                "into training, validation and test parts; fetch the published lists again"
            )
        parts[group] = (kept[first], kept[second], tests)
    return parts


def make_population(
    pool: DecodedExamples,
    classes: int,
    seen: Mapping[str, ClientIndices],
    unseen: Mapping[str, ClientIndices],
) -> SharedPool:
    """Return the clients over the decoded images, normalised, flipped and rotated in training."""
    return SharedPool(
        pool.x,
        torch.from_numpy(pool.column("label")),
        seen=seen,
        unseen=unseen,
        classes=classes,
        prepare=NORMALISE,
        augment=FlipAndRotate(degrees=30, black=NORMALISE.black),
    )
