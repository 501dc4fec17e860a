"""CIFAR-10, dealt to clients with label skew.

60,000 photographs of 32 x 32 pixels in ten classes (A. Krizhevsky 2009, "Learning Multiple Layers
of Features from Tiny Images", https://www.cs.toronto.edu/~kriz/cifar.html), read from the published
binary version: per image one byte for the label and 3072 for red, green and blue, row by row. Its
images are in the order of the Python version.

As FedL2P's authors use it (NeurIPS 2023, section 4): 1,000 clients with 50 of the 50,000 training
images and 10 of the 10,000 test images each; a client's class distribution is one draw from
Dirichlet(alpha), the same for all its parts (:func:`fedl2p.data.pools.partition.deal`); no two
clients share an image. A client's training images are split 80/20 into training and validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedl2p.data.files.archives import unpack
from fedl2p.data.files.cache import Allocate, Columns, DecodedExamples, fingerprint, open_cache
from fedl2p.data.files.downloads import RemoteFile, fetch
from fedl2p.data.files.folders import (
    ProgressCallback,
    problems_of,
    remedy,
    root_of,
    unpacked_files,
)
from fedl2p.data.pools.augmentation import CropAndFlip
from fedl2p.data.pools.client_indices import check_counts, client_names, deal_clients
from fedl2p.data.pools.shared_pool import Normalise, SharedPool

NAME = "cifar10"
ARCHIVE = RemoteFile(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    name="cifar-10-binary.tar.gz",
    checksum="md5:c32a1d4ab5d03f1284b67883e8d87530",
)
FOLDER = "cifar-10-batches-bin"
MAX_BYTES = 256 << 20
"""Most bytes that the archive may unpack to; the published one has 184 MB."""
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SHAPE = (3, 32, 32)
BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
ROW = 1 + 3 * 32 * 32

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
        seen = client_names("seen", self.seen)
        unseen = client_names("unseen", self.unseen)
        indices = deal_clients(
            labels,
            torch.from_numpy(pool.column("test") == 1),
            [*seen, *unseen],
            train=self.train,
            validation=self.validation,
            test=self.test,
            classes=len(CLASSES),
            alpha=self.alpha,
            seed=(seed, NAME),
        )
        return SharedPool(
            pool.x,
            labels,
            seen={name: indices[name] for name in seen},
            unseen={name: indices[name] for name in unseen},
            classes=len(CLASSES),
            prepare=NORMALISE,
            augment=CropAndFlip(padding=4, black=NORMALISE.black),
        )


def load(root: Path) -> DecodedExamples:
    """Return all images, training images first, with the columns ``label`` and ``test`` (0 or 1).

    Raises
    ------
    ValueError
        If a file is missing, damaged or not of CIFAR-10's form, or a class has no training or no
        test image.
    """
    files = unpacked_files(root / FOLDER, BATCHES, name=NAME)

    def build(allocate: Allocate) -> Columns:
        batches = [map_batch(file) for file in files]
        labels = [np.array(batch[:, 0]) for batch in batches]
        _check_classes(root, training=np.concatenate(labels[:-1]), test=labels[-1])
        x = allocate((sum(map(len, batches)), *SHAPE), np.uint8)
        np.concatenate([batch[:, 1:] for batch in batches], out=x.reshape(len(x), -1))
        tests = len(labels[-1])
        return {
            "label": np.concatenate(labels).tolist(),
            "test": [0] * (len(x) - tests) + [1] * tests,
        }

    return open_cache(root / "cache" / "all", key={"files": fingerprint(files)}, build=build)


def map_batch(path: Path) -> np.ndarray:
    """Map a batch file into memory: rows of a label and 3 x 32 x 32 pixels, (n, 3073), uint8.

    Raises
    ------
    ValueError
        If it is cut off or holds a label above 9.
    """
    size = path.stat().st_size
    if not size or size % ROW:
        raise ValueError(
            f"{path} has {size} bytes, but must have a multiple of {ROW} (a label and 3 x 32 x 32 "
            f"pixels per image); {remedy(path.parent, NAME)}"
        )
    rows = np.memmap(path, np.uint8, mode="r").reshape(-1, ROW)
    if rows[:, 0].max() >= len(CLASSES):
        raise ValueError(
            f"{path} holds the label {rows[:, 0].max()}, not 0 to 9; {remedy(path.parent, NAME)}"
        )
    return rows


def _check_classes(root: Path, **parts: np.ndarray) -> None:
    for part, labels in parts.items():
        counts = np.bincount(labels, minlength=len(CLASSES))
        if not counts.all():
            empty = int(counts.argmin())
            raise ValueError(
                f"{root / FOLDER} holds no {part} image of class {empty} ({CLASSES[empty]}); "
                f"{remedy(root / FOLDER, NAME)}"
            )


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download the archive (170 MB), check it, and unpack it."""
    if not (root / FOLDER).exists():
        archive = fetch(ARCHIVE, root, progress)
        unpack(archive, root / FOLDER, max_bytes=MAX_BYTES, max_files=16, progress=progress)
    return check(root)


def check(root: Path) -> list[str]:
    """Return what is missing or damaged in the folder; every file is read."""
    return problems_of(root / FOLDER, BATCHES, map_batch, name=NAME)
