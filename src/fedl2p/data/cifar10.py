"""CIFAR-10, dealt to clients with label skew.

60,000 photographs of 32 x 32 pixels in ten classes (A. Krizhevsky 2009, "Learning Multiple Layers
of Features from Tiny Images", https://www.cs.toronto.edu/~kriz/cifar.html), as the published
archive of Python 2 pickles.

As FedL2P's authors use it (NeurIPS 2023, section 4): 1,000 clients with 50 of the 50,000 training
images and 10 of the 10,000 test images each; a client's class distribution is one draw from
Dirichlet(alpha), the same for all its parts (:func:`fedl2p.data.pools.partition.deal`); no two
clients share an image. A client's training images are split 80/20 into training and validation
part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedl2p.data.files.archives import unpack
from fedl2p.data.files.cache import Allocate, Cached, Columns, cached, fingerprint
from fedl2p.data.files.downloads import RemoteFile, fetch
from fedl2p.data.files.folders import ProgressCallback, root_of, unpacked_files
from fedl2p.data.files.plain_pickle import load_plain
from fedl2p.data.pools.augmentation import CropAndFlip
from fedl2p.data.pools.dealing import Holding, check_counts, names_of, split
from fedl2p.data.pools.partition import class_distribution, deal
from fedl2p.data.pools.shared_pool import Normalise, SharedPool
from fedl2p.seeds import generator

NAME = "cifar10"
ARCHIVE = RemoteFile(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    name="cifar-10-python.tar.gz",
    checksum="md5:c58f30108f718f92721af3b95e74349a",
)
FOLDER = "cifar-10-batches-py"
MAX_BYTES = 256 << 20
"""Most bytes that the archive may unpack to; the published one has 186 MB."""
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SHAPE = (3, 32, 32)
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

NORMALISE = Normalise(mean=(0.4914, 0.4822, 0.4465), sd=(0.2023, 0.1994, 0.2010))
"""The published constants, those of the training images."""


@dataclass(frozen=True, kw_only=True)
class Cifar10:
    """CIFAR-10 with label skew.

    Parameters
    ----------
    root
        The data set's folder; None for $FEDL2P_DATA/cifar10 or data/cifar10.
    seen
        Number of clients that take part in training.
    unseen
        Number of clients that only come afterwards.
    alpha
        Concentration of the Dirichlet distribution that each client's class distribution is drawn
        from: 0.1 is strong label skew, 1000 is none.
    train
        Images in a client's training part, from the 50,000 training images.
    validation
        Images in a client's validation part, from the 50,000 training images.
    test
        Images in a client's test part, from the 10,000 test images.
    """

    root: Path | None = None
    seen: int = 1000
    unseen: int = 0
    alpha: float = 1.0
    train: int = 40
    validation: int = 10
    test: int = 10

    def __post_init__(self) -> None:
        check_counts(self, at_least_one=("seen", "train", "validation", "test"), or_none="unseen")

    def open(self, seed: int) -> SharedPool:
        """Return the population under a seed.

        The first call decodes the images into one file, which every later one maps.

        Raises
        ------
        ValueError
            If the data is missing or damaged, or too little for so many clients.
        """
        pool = load(root_of(NAME, self.root))
        labels = torch.from_numpy(pool.column("label"))
        seen, unseen = names_of("seen", self.seen), names_of("unseen", self.unseen)
        holdings = self._deal(seed, [*seen, *unseen], labels, pool.column("test") == 1)
        return SharedPool(
            pool.x,
            labels,
            seen={name: holdings[name] for name in seen},
            unseen={name: holdings[name] for name in unseen},
            classes=len(CLASSES),
            prepare=NORMALISE,
            augment=CropAndFlip(padding=4, black=NORMALISE.black),
        )

    def _deal(
        self, seed: int, names: Sequence[str], labels: Tensor, is_test: np.ndarray
    ) -> dict[str, Holding]:
        # Who is dealt last gets what is left; in random order that is not always the unseen.
        order = torch.randperm(len(names), generator=generator(seed, NAME, "order")).tolist()
        shuffled = [names[i] for i in order]
        distributions = torch.stack(
            [
                class_distribution(
                    len(CLASSES),
                    alpha=self.alpha,
                    generator=generator(seed, NAME, name, "labels"),
                )
                for name in shuffled
            ]
        )
        dealt = []
        for test, count in ((False, self.train + self.validation), (True, self.test)):
            own = torch.from_numpy(np.flatnonzero(is_test == test))
            rng = generator(seed, NAME, "test" if test else "train")
            parts = deal(labels[own], distributions, count, generator=rng)
            dealt.append([own[part] for part in parts])
        holdings = {}
        for name, own, test in zip(shuffled, *dealt, strict=True):
            train, validation = split(own, self.validation)
            holdings[name] = Holding(train=train, validation=validation, test=test)
        return holdings


def load(root: Path) -> Cached:
    """Return all images, training images first, with the columns ``label`` and ``test`` (0 or 1).

    Raises
    ------
    ValueError
        If the data is missing or damaged.
    """
    files = unpacked_files(root / FOLDER, BATCHES, name=NAME)

    def build(allocate: Allocate) -> Columns:
        images, labels = read_batches(root)
        counts = [len(labels[batch]) for batch in BATCHES]
        x = allocate((sum(counts), *SHAPE), np.uint8)
        begin = 0
        for batch, count in zip(BATCHES, counts, strict=True):
            x[begin : begin + count] = images.pop(batch)
            begin += count
        tests = counts[-1]
        return {
            "label": [label for batch in BATCHES for label in labels[batch]],
            "test": [0] * (begin - tests) + [1] * tests,
        }

    return cached(root / "cache" / "all", key={"files": fingerprint(files)}, build=build)


def read_batches(root: Path) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Return images (n, 3, 32, 32), uint8, and labels of every batch, by the batch's name.

    Raises
    ------
    ValueError
        If a batch is missing, damaged, not plain data, or not of CIFAR-10's form; or if a class
        has no image in the training or in the test batches.
    """
    images, labels = {}, {}
    for path, batch in zip(unpacked_files(root / FOLDER, BATCHES, name=NAME), BATCHES, strict=True):
        images[batch], labels[batch] = _read_batch(path.read_bytes(), str(path))
    for what, batches in (("training", BATCHES[:-1]), ("test", BATCHES[-1:])):
        held = {label for batch in batches for label in labels[batch]}
        for number, name in enumerate(CLASSES):
            if number not in held:
                raise ValueError(
                    f"{root}: the {what} batches hold no image of class {number} ({name}); fetch "
                    f"the published archive with `fedl2p data get {NAME} --root {root}`"
                )
    return images, labels


def _read_batch(content: bytes, source: str) -> tuple[np.ndarray, list[int]]:
    said: Any = load_plain(content, source=source)
    data = said.get(b"data") if isinstance(said, dict) else None
    labels = said.get(b"labels") if isinstance(said, dict) else None
    pixels = int(np.prod(SHAPE))
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
        raise ValueError(f"{source} has no array of bytes named data; it is no batch of CIFAR-10")
    if data.shape[1] != pixels:
        raise ValueError(
            f"{source} holds images of {data.shape[1]} values, but CIFAR-10's have {pixels} "
            "(3 x 32 x 32); fetch the published archive"
        )
    if not (isinstance(labels, list) and len(labels) == len(data)):
        raise ValueError(f"{source} does not hold one label per image; it is no batch of CIFAR-10")
    if not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError(f"{source} holds a label that is not one of 0 to {len(CLASSES) - 1}")
    return data.reshape(-1, *SHAPE), labels


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download the archive (170 MB), check it, and unpack it."""
    if not (root / FOLDER).exists():
        archive = fetch(ARCHIVE, root, progress)
        unpack(archive, root / FOLDER, max_bytes=MAX_BYTES, max_files=16, progress=progress)
    return check(root)


def check(root: Path) -> list[str]:
    """Return what is missing or damaged in the folder; every file is read."""
    try:
        read_batches(root)
    except ValueError as problem:
        return [str(problem)]
    return []
