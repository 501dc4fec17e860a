"""CIFAR-10-C: CIFAR-10's test images under common corruptions; every client has one corruption.

D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, https://arxiv.org/abs/1903.12261. Per corruption one .npy file of the
10,000 test images at five severities, one after another; labels.npy holds their labels.

As FedL2P's authors use it (NeurIPS 2023, section 4): ten corruptions at the middle severity, 25
clients each. The images are split 80/20 into training and test, the former 80/20 into training and
validation, class by class; each part is then dealt among the clients of a corruption with label
skew, equally many to each. The split is the same for all corruptions: no photograph is in one
client's training and another's test part under another corruption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedl2p.data.cifar10 import CLASSES, NORMALISE, SHAPE
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
from fedl2p.data.pools.client_indices import check_counts, deal_groups
from fedl2p.data.pools.partition import stratified_split
from fedl2p.data.pools.shared_pool import SharedPool
from fedl2p.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

NAME = "cifar10c"
ARCHIVE = RemoteFile(
    url="https://zenodo.org/records/2535967/files/CIFAR-10-C.tar",
    name="CIFAR-10-C.tar",
    checksum="md5:56bf5dcef84df0e2308c6dcbcbbd8499",
)
FOLDER = "CIFAR-10-C"
MAX_BYTES = 4 << 30
"""Most bytes that the archive may unpack to; the published one has 2.9 GB."""
SEVERITIES = 5
PUBLISHED = 10_000
"""Images per corruption and severity of the published files."""

CORRUPTIONS = (
    *("brightness", "frost", "jpeg_compression", "contrast", "snow"),
    *("motion_blur", "pixelate", "speckle_noise", "fog", "saturate"),
)
"""The ten that FedL2P's authors use."""

ALL_CORRUPTIONS = (
    *CORRUPTIONS,
    *("shot_noise", "gaussian_blur", "defocus_blur", "gaussian_noise", "spatter"),
    *("elastic_transform", "glass_blur", "impulse_noise", "zoom_blur"),
)

SHARES = (0.64, 0.16, 0.2)  # of training, validation and test


@dataclass(frozen=True, kw_only=True)
class Cifar10C:
    """CIFAR-10-C with label skew, one corruption per client.

    Parameters
    ----------
    root
        The data set's folder; None for $FEDL2P_DATA/cifar10c or data/cifar10c.
    corruptions
        Names of the corruptions.
    severity
        0, the mildest, to 4.
    seen
        Clients per corruption that take part in training.
    unseen
        Clients per corruption that only come afterwards.
    alpha
        Concentration of the Dirichlet distribution that each client's class distribution is drawn
        from: 0.1 is strong label skew, 1000 is none.
    """

    root: Path | None = None
    corruptions: tuple[str, ...] = CORRUPTIONS
    severity: int = 2
    seen: int = 25
    unseen: int = 0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, at_least_one=("seen",), or_none="unseen")
        if not 0 <= self.severity <= 4:
            raise ValueError(f"severity must be 0 to 4, got {self.severity}")
        if not self.corruptions or len(set(self.corruptions)) != len(self.corruptions):
            raise ValueError(f"corruptions must be different names, got {self.corruptions}")
        for kind in self.corruptions:
            if kind not in ALL_CORRUPTIONS:
                raise ValueError(
                    f"there is no corruption {kind!r}; there are {', '.join(ALL_CORRUPTIONS)}"
                )

    def open(self, seed: int) -> SharedPool:
        """Return the population under a seed.

        The first call copies these corruptions at this severity into one file, which every later
        one maps.

        Raises
        ------
        ValueError
            If the data is missing or damaged, or too little for so many clients.
        """
        pool = load(root_of(NAME, self.root), self.corruptions, self.severity)
        label = torch.from_numpy(pool.column("label"))
        per_kind = len(label) // len(self.corruptions)
        parts = stratified_split(label[:per_kind], SHARES, generator=generator(seed, NAME, "parts"))
        groups: dict[str, tuple[Tensor, Tensor, Tensor]] = {
            kind: (parts[0] + i * per_kind, parts[1] + i * per_kind, parts[2] + i * per_kind)
            for i, kind in enumerate(self.corruptions)
        }
        seen, unseen = deal_groups(
            groups,
            label,
            seen=self.seen,
            unseen=self.unseen,
            classes=len(CLASSES),
            alpha=self.alpha,
            seed=(seed, NAME),
            kind="corruption",
        )
        return SharedPool(
            pool.x,
            label,
            seen=seen,
            unseen=unseen,
            classes=len(CLASSES),
            prepare=NORMALISE,
            augment=CropAndFlip(padding=4, black=NORMALISE.black),
        )


def load(root: Path, corruptions: tuple[str, ...], severity: int) -> DecodedExamples:
    """Return the images of these corruptions, equally many each, with the column ``label``.

    Raises
    ------
    ValueError
        If the data is missing or damaged.
    """
    names = [f"{name}.npy" for name in ("labels", *corruptions)]
    files = unpacked_files(root / FOLDER, names, name=NAME)

    def build(allocate: Allocate) -> Columns:
        labels, *images = map(map_rows, files)
        for file, rows in zip(files, (labels, *images), strict=True):
            if len(rows) != len(labels) or len(rows) % SEVERITIES or not len(rows):
                raise ValueError(
                    f"{file} holds {len(rows)} rows, and {files[0]} {len(labels)}; fetch the "
                    "published files"
                )
        count = len(labels) // SEVERITIES
        chosen = slice(severity * count, (severity + 1) * count)
        x = allocate((len(images) * count, *SHAPE), np.uint8)
        for i, rows in enumerate(images):
            x[i * count : (i + 1) * count] = rows[chosen].transpose(0, 3, 1, 2)
        return {"label": _checked(labels[chosen], files[0]) * len(images)}

    key = {"files": fingerprint(files), "corruptions": corruptions, "severity": severity}
    return open_cache(root / "cache" / f"severity-{severity}", key=key, build=build)


def map_rows(path: Path) -> np.ndarray:
    """Map a file of the archive into memory: labels (n,), or images (n, 32, 32, 3), uint8.

    Raises
    ------
    ValueError
        If it is no .npy file of that kind, or cut off.
    """
    is_labels = path.stem == "labels"
    shape: tuple[int, ...] = () if is_labels else (32, 32, 3)
    kinds = ("uint8", "int32", "int64") if is_labels else ("uint8",)
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as problem:  # a damaged header may raise anything
        why = " ".join(str(problem).split())
        raise ValueError(
            f"{path} is no .npy file of numbers, or cut off ({why}); fetch the published file"
        ) from None
    if rows.ndim != 1 + len(shape) or rows.shape[1:] != shape or rows.dtype.name not in kinds:
        raise ValueError(
            f"{path} holds {rows.dtype} of shape {rows.shape}, but must hold {' or '.join(kinds)} "
            f"of shape {('n', *shape)}; fetch the published file"
        )
    return rows


def _checked(labels: np.ndarray, source: Path) -> list[int]:
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(f"{source} holds a label that is not one of 0 to {len(CLASSES) - 1}")
    counts = np.bincount(labels, minlength=len(CLASSES))
    if not counts.all():
        empty = int(counts.argmin())
        raise ValueError(
            f"{source} holds no image of class {empty} ({CLASSES[empty]}); fetch the published file"
        )
    return [int(label) for label in labels]


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download the archive (2.9 GB), check it, and unpack it."""
    if not (root / FOLDER).exists():
        archive = fetch(ARCHIVE, root, progress)
        unpack(archive, root / FOLDER, max_bytes=MAX_BYTES, max_files=64, progress=progress)
    return check(root)


def check(root: Path) -> list[str]:
    """Return what is missing or damaged in the folder: the shape of every file is read."""

    def read(path: Path) -> None:
        if (rows := len(map_rows(path))) != SEVERITIES * PUBLISHED:
            raise ValueError(
                f"{path} holds {rows} rows, but must hold {SEVERITIES * PUBLISHED}; "
                f"{remedy(root / FOLDER, NAME)}"
            )

    names = [f"{name}.npy" for name in (*ALL_CORRUPTIONS, "labels")]
    return problems_of(root / FOLDER, names, read, name=NAME)
