"""Small archives in the formats in which the data sets are published, written by hand."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR_BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


def cifar_batch(data: np.ndarray, labels: Sequence[int]) -> bytes:
    """The content of one of CIFAR-10's binary batch files; ``data`` of shape (n, 3072), uint8."""
    return np.column_stack([np.array(labels, np.uint8), data]).tobytes()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a tar archive, compressed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith(".gz") else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a zip archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def idx(array: np.ndarray, *, code: int = 8, compressed: bool = False) -> bytes:
    """The content of an idx file of an array; ``code`` is the type's, 8 for bytes."""
    head = bytes((0, 0, code, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    content = head + array.astype(array.dtype.newbyteorder(">")).tobytes()
    return gzip.compress(content) if compressed else content


def fashion_files(train: int = 400, test: int = 200, *, side: int = 28) -> dict[str, bytes]:
    """The four files of Fashion-MNIST with equally many images per class.

    An image's first pixels are its number, high and low byte, and its label; test images count on
    from the training images. The others are noise, brighter the higher the label.
    """
    rng = np.random.default_rng(0)
    files, begin = {}, 0
    for part, count in (("train", train), ("t10k", test)):
        number, labels = np.arange(begin, begin + count), np.arange(count) % 10
        images = rng.integers(0, 30, (count, side, side)) + 20 * labels[:, None, None]
        images[:, 0, 0], images[:, 0, 1], images[:, 0, 2] = number // 256, number % 256, labels
        begin += count
        # one compressed, as Debian and the site have them, one not
        pixels = images.astype(np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = idx(pixels, compressed=True)
        files[f"{part}-labels-idx1-ubyte"] = idx(labels.astype(np.uint8))
    return files


def cifar10_files(
    train: int = 200, test: int = 60, *, seed: int = 0, changed: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """The files of a CIFAR-10 archive with equally many images per class.

    The first pixel of an image is its number modulo 256, the second its label.
    """
    rng = np.random.default_rng(seed)
    counts = [train // 5] * 5 + [test]
    files = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\nautomobile\n"}
    for name, count in zip(CIFAR_BATCHES, counts, strict=True):
        labels = np.arange(count) % 10
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        data[:, 0] = np.arange(count) % 256
        data[:, 1] = labels
        files[f"cifar-10-batches-bin/{name}"] = cifar_batch(data, labels.tolist())
    return files | {f"cifar-10-batches-bin/{k}": v for k, v in (changed or {}).items()}


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below a folder, as an archive of them unpacks."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_cifar10(root: Path, **options: Any) -> Path:
    """Write the files of a CIFAR-10 archive into a folder."""
    return write_folder(root, cifar10_files(**options))


def npy(array: np.ndarray) -> bytes:
    """The content of a .npy file."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def cifar10c_files(
    corruptions: Sequence[str], per_severity: int = 100, *, seed: int = 0
) -> dict[str, bytes]:
    """The files of a CIFAR-10-C archive.

    Red of the first pixel is the image's number, green its severity, blue its corruption's number.
    """
    rng = np.random.default_rng(seed)
    files = {}
    for number, kind in enumerate(corruptions):
        images = rng.integers(0, 256, (5 * per_severity, 32, 32, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.tile(np.arange(per_severity), 5)
        images[:, 0, 0, 1] = np.repeat(np.arange(5), per_severity)
        images[:, 0, 0, 2] = number
        files[f"CIFAR-10-C/{kind}.npy"] = npy(images)
    labels = np.tile(np.arange(per_severity) % 10, 5).astype(np.uint8)
    files["CIFAR-10-C/labels.npy"] = npy(labels)
    return files


def picture(label: int, *, size: tuple[int, int] = (20, 30), mode: str = "RGB") -> bytes:
    """A PNG of one colour that tells the label."""
    out = io.BytesIO()
    colour = (20 * label, 255 - 20 * label, 100)
    Image.new("RGB", size, colour).convert(mode).save(out, "PNG")
    return out.getvalue()


def fedbn_lists(
    inner: str,
    counts: Mapping[str, tuple[int, int]],
    classes: Sequence[str],
    *,
    arrays: bool = False,
) -> tuple[dict[str, bytes], dict[str, dict[str, bytes]]]:
    """FedBN's pickles, and the images that they list, by domain.

    Parameters
    ----------
    inner
        The folder with which the listed paths begin.
    counts
        Numbers of training and test images per domain.
    arrays
        Whether the columns are numpy arrays instead of lists.
    """
    lists, images = {}, {}
    for domain, sizes in counts.items():
        images[domain] = {}
        for part, count in zip(("train", "test"), sizes, strict=True):
            names = [classes[i % len(classes)] for i in range(count)]
            paths = [f"{inner}/{domain}/{name}/{part}_{i}.png" for i, name in enumerate(names)]
            columns: Any = (paths, names)
            if arrays:
                columns = (np.array(paths), np.array(names, dtype=object))
            lists[f"{domain}_{part}.pkl"] = pickle.dumps(columns, protocol=4)
            for path, name in zip(paths, names, strict=True):
                short = path.removeprefix(f"{inner}/")
                images[domain][short] = picture(classes.index(name))
    return lists, images
