"""Fashion-MNIST, dealt to clients with label skew, plain or seen through simulated sensors.

70,000 grey photographs of 28 x 28 pixels in ten classes of clothes (H. Xiao, K. Rasul and R.
Vollgraf 2017, https://arxiv.org/abs/1708.07747; Expat licence), in four idx files. Debian's package
``dataset-fashion-mnist`` installs them; ``fedl2p data get fashion`` downloads them. Files of other
images of one size with the same four names, MNIST's for example, are read just as well.

:class:`Fashion` follows what FedL2P's authors do with CIFAR-10, :class:`FashionC` what they do with
CIFAR-10-C (NeurIPS 2023, section 4), see :mod:`fedl2p.data.cifar10` and
:mod:`fedl2p.data.cifar10c`. The corruptions of :class:`FashionC` are the sensors of
:mod:`fedl2p.data.pools.sensors`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedl2p.data.files.downloads import RemoteFile, fetch_all
from fedl2p.data.files.folders import ProgressCallback, root_of
from fedl2p.data.files.idx import read_idx
from fedl2p.data.pools.client_indices import (
    check_counts,
    client_names,
    deal_clients,
    deal_groups,
)
from fedl2p.data.pools.partition import stratified_split
from fedl2p.data.pools.sensors import SENSORS, apply_sensor
from fedl2p.data.pools.shared_pool import Normalise, SharedPool
from fedl2p.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

NAME = "fashion"
SITE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
CHECKSUMS = {
    "train-images-idx3-ubyte": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    ),
    "train-labels-idx1-ubyte": (
        "25c81989df183df01b3e8a0aad5dffbe",
        "9018921c3c673c538a1fc5bad174d6f9",
    ),
    "t10k-images-idx3-ubyte": (
        "bef4ecab320f06d8554ea6380940ec79",
        "8181f5470baa50b63fa0f6fddb340f0a",
    ),
    "t10k-labels-idx1-ubyte": (
        "bb300cfdad3c16e7a12a480ee83cd310",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}
"""MD5 of each published file, and of its content as an idx header and values: packages compress
anew."""
FILES = tuple(CHECKSUMS)
"""Images and labels of the training part, then those of the test part."""
LARGEST = 1 << 30
"""Most bytes of one file that are read; the published ones have up to 47 MB."""

NORMALISE = Normalise(mean=(0.2860,), sd=(0.3530,))
"""Mean and standard deviation of the training images."""

CORRUPTIONS = (
    *("inversion", "brightness", "contrast", "noise", "blur"),
    *("thin", "rotation", "occlusion", "pixelation", "illumination"),
)


@dataclass(frozen=True)
class LabelledImages:
    """The images of a data set.

    Parameters
    ----------
    x
        Shape (n, 1, height, width), uint8; training images first.
    labels
        Shape (n,), int64.
    train
        Number of training images.
    classes
        Number of classes.
    """

    x: np.ndarray
    labels: Tensor
    train: int
    classes: int

    @property
    def is_test(self) -> Tensor:
        """Whether an image is one of the test part, shape (n,)."""
        return torch.arange(len(self.labels)) >= self.train


@dataclass(frozen=True, kw_only=True)
class Fashion:
    """Fashion-MNIST with label skew.

    Parameters
    ----------
    root
        The folder of the four files; None for $FEDL2P_DATA/fashion or data/fashion, or where these
        are not there that of Debian's package dataset-fashion-mnist.
    seen
        Number of clients that take part in training.
    unseen
        Number of clients that only come afterwards.
    alpha
        Concentration of the Dirichlet distribution that each client's class distribution is drawn
        from: 0.1 is strong label skew, 1000 is none.
    train
        Images in a client's training part, from the 60,000 training images.
    validation
        Images in a client's validation part, from the 60,000 training images.
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

        Raises
        ------
        ValueError
            If the data is missing or damaged, or too little for so many clients.
        """
        images = load(root_of(NAME, self.root))
        seen = client_names("seen", self.seen)
        unseen = client_names("unseen", self.unseen)
        indices = deal_clients(
            images.labels,
            images.is_test,
            [*seen, *unseen],
            train=self.train,
            validation=self.validation,
            test=self.test,
            classes=images.classes,
            alpha=self.alpha,
            seed=(seed, NAME),
        )
        return SharedPool(
            images.x,
            images.labels,
            seen={name: indices[name] for name in seen},
            unseen={name: indices[name] for name in unseen},
            classes=images.classes,
            prepare=NORMALISE,
        )


@dataclass(frozen=True, kw_only=True)
class FashionC:
    """Fashion-MNIST's test images with label skew, one corruption per client.

    The images are split 80/20 into training and test, the former 80/20 into training and
    validation; the split is the same for all corruptions. The global model is pre-trained on the
    clients of Fashion under the same label skew, whose images are clean.

    Parameters
    ----------
    root
        The folder of the four files; None for $FEDL2P_DATA/fashion or data/fashion, or where these
        are not there that of Debian's package dataset-fashion-mnist.
    corruptions
        Names of the corruptions.
    severity
        In [0, 1], from the mildest to the strongest form.
    seen
        Clients per corruption that take part in training.
    unseen
        Clients per corruption that only come afterwards.
    alpha
        Concentration of the Dirichlet distribution that each client's class distribution is drawn
        from: 0.1 is strong label skew, 1000 is none.
    clean
        Number of clean clients, 50 images each, that the global model is pre-trained on.
    """

    root: Path | None = None
    corruptions: tuple[str, ...] = CORRUPTIONS
    severity: float = 0.5
    seen: int = 25
    unseen: int = 0
    alpha: float = 1.0
    clean: int = 1000

    def __post_init__(self) -> None:
        check_counts(self, at_least_one=("seen", "clean"), or_none="unseen")
        if not 0 <= self.severity <= 1:
            raise ValueError(f"severity must be in [0, 1], got {self.severity}")
        if not self.corruptions or len(set(self.corruptions)) != len(self.corruptions):
            raise ValueError(f"corruptions must be different names, got {self.corruptions}")
        for kind in self.corruptions:
            if kind not in SENSORS:
                raise ValueError(f"there is no corruption {kind!r}; there are {', '.join(SENSORS)}")

    def open(self, seed: int) -> SharedPool:
        """Return the population under a seed.

        Raises
        ------
        ValueError
            If the data is missing or damaged, or too little for so many clients.
        """
        images = load(root_of(NAME, self.root))
        clean, labels = images.x[images.train :], images.labels[images.train :]
        parts = stratified_split(labels, (0.64, 0.16, 0.2), generator=self._generator(seed))
        num = len(labels)
        groups: dict[str, tuple[Tensor, Tensor, Tensor]] = {
            kind: (parts[0] + i * num, parts[1] + i * num, parts[2] + i * num)
            for i, kind in enumerate(self.corruptions)
        }
        labels = labels.repeat(len(self.corruptions))
        seen, unseen = deal_groups(
            groups,
            labels,
            seen=self.seen,
            unseen=self.unseen,
            classes=images.classes,
            alpha=self.alpha,
            seed=(seed, "fashionc"),
            kind="corruption",
        )
        return SharedPool(
            np.concatenate([self._corrupted(kind, clean, seed) for kind in self.corruptions]),
            labels,
            seen=seen,
            unseen=unseen,
            classes=images.classes,
            prepare=NORMALISE,
            open_pretraining=lambda: Fashion(
                root=self.root, seen=self.clean, alpha=self.alpha
            ).open(seed),
        )

    def _corrupted(self, kind: str, images: np.ndarray, seed: int) -> np.ndarray:
        """Return the images under a corruption, rounded to bytes as CIFAR-10-C's are."""
        pixels = torch.from_numpy(images).to(torch.float32) / 255
        rng = self._generator(seed, kind)
        corrupted = apply_sensor(kind, pixels, severity=self.severity, generator=rng)
        return np.asarray((corrupted * 255).round().to(torch.uint8))

    @staticmethod
    def _generator(seed: int, *parts: str) -> torch.Generator:
        return generator(seed, "fashionc", "images", *parts)


def load(root: Path) -> LabelledImages:
    """Return the images in four idx files, compressed by gzip or not.

    Raises
    ------
    ValueError
        If a file is missing or damaged, files do not fit together, or a class has no training or no
        test image.
    """
    paths = tuple(_path(root, name) for name in FILES)
    return _load(paths, tuple(path.stat().st_mtime_ns for path in paths))


@lru_cache(maxsize=1)
def _load(paths: tuple[Path, ...], changed: tuple[int, ...]) -> LabelledImages:
    (train, train_labels), (test, test_labels) = (_read_pair(*paths[i : i + 2]) for i in (0, 2))
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"{paths[0]} holds images of {_size(train)} pixels and {paths[2]} of {_size(test)}; "
            "place files of one data set"
        )
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    for path, labels in ((paths[1], train_labels), (paths[3], test_labels)):
        counts = np.bincount(labels, minlength=classes)
        if not counts.all():
            raise ValueError(
                f"{path} holds no image of class {counts.argmin()}, though labels run to "
                f"{classes - 1}; place the published files"
            )
    return LabelledImages(
        np.concatenate([train, test])[:, None],
        torch.from_numpy(np.concatenate([train_labels, test_labels]).astype(np.int64)),
        len(train),
        classes,
    )


def _read_pair(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    x, y = read_idx(images, largest=LARGEST), read_idx(labels, largest=LARGEST)
    if x.ndim != 3 or x.dtype != np.uint8 or not x.size:
        raise ValueError(
            f"{images} holds {x.dtype} of shape {x.shape}, but must hold images, uint8 of shape "
            "(n, height, width); place the published file"
        )
    if y.dtype != np.uint8 or y.shape != x.shape[:1]:
        raise ValueError(
            f"{labels} holds {y.dtype} of shape {y.shape}, but must hold a label for each of the "
            f"{len(x)} images, uint8; place the published file"
        )
    return x, y


def _size(images: np.ndarray) -> str:
    return " x ".join(map(str, images.shape[1:]))


def _path(root: Path, name: str) -> Path:
    """Return the path of a file, compressed or not."""
    for path in (root / f"{name}.gz", root / name):
        if path.is_file():
            return path
    raise ValueError(
        f"{root / name}.gz is missing; install Debian's package dataset-fashion-mnist (apt-get "
        f"install dataset-fashion-mnist), or run `fedl2p data get {NAME} --root {root}`"
    )


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download the four files (31 MB) that are not there, and check them all."""
    absent = [name for name in FILES if not (root / name).exists()]
    absent = [name for name in absent if not (root / f"{name}.gz").exists()]
    remote = [
        RemoteFile(url=f"{SITE}/{name}.gz", name=f"{name}.gz", checksum=f"md5:{CHECKSUMS[name][0]}")
        for name in absent
    ]
    return fetch_all(remote, root, progress) or check(root)


def check(root: Path) -> list[str]:
    """Return what is missing or damaged in the folder; the content of every file is compared."""
    problems = []
    for name, (_, expected) in CHECKSUMS.items():
        try:
            path = _path(root, name)
            found = _checksum(read_idx(path, largest=LARGEST))
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if found != expected:
            problems.append(
                f"{path} is not Fashion-MNIST's: the MD5 of its content is {found}, but must be "
                f"{expected}; delete it and run `fedl2p data get {NAME} --root {root}`"
            )
    return problems


def _checksum(array: np.ndarray) -> str:
    """Return the MD5 of an idx file of bytes that holds this array."""
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    # Without usedforsecurity=False some systems refuse MD5.
    digest = hashlib.md5(head, usedforsecurity=False)
    digest.update(array.tobytes())
    return digest.hexdigest()
