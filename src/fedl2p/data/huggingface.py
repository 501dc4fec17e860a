"""Any data set of images on the Hugging Face hub, or a folder of Parquet files in its form.

The data set is loaded by ``datasets`` (a folder without any connection) and partitioned among the
clients by one of the partitioners of ``flwr_datasets`` (https://flower.ai/docs/datasets), written
as in Python, e.g. ``DirichletPartitioner(num_partitions=20, partition_by='label', alpha=0.5)``; its
arguments are literals, nothing is executed. A partitioner's seed follows from the study's unless
one is given. Every client's examples are then split at random into 64 % training, 16 % validation
and 20 % test, at least one each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fedl2p.core.clientdata import Augment
from fedl2p.data.files.cache import Allocate, Columns, DecodedExamples, fingerprint, open_cache
from fedl2p.data.files.folders import needs, root_of
from fedl2p.data.files.images import decode_all
from fedl2p.data.pools.augmentation import CropAndFlip, FlipAndRotate
from fedl2p.data.pools.client_indices import ClientIndices, client_names
from fedl2p.data.pools.flwr_partitioners import parse_partitioner, partition
from fedl2p.data.pools.shared_pool import Normalise, SharedPool
from fedl2p.seeds import derive_seed, generator

if TYPE_CHECKING:
    import datasets

NAME = "huggingface"


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A data set of the hub, or a local folder of Parquet files.

    Parameters
    ----------
    dataset
        Its name on the hub, or the path of a folder. Empty only until one is named.
    subset
        Its configuration, if it has several.
    split
        The split that is partitioned among the clients.
    image
        The column of images.
    label
        The column of labels: integers from 0, or text.
    partitioner
        A partitioner of flwr_datasets with its arguments, as in Python.
    unseen
        How many of the clients, drawn at random, only come afterwards.
    channels
        3 for colours, 1 for grey.
    size
        Height and width that images are resized to; None if all have one size.
    mean
        Mean of a pixel in [0, 1], for the normalisation.
    sd
        Standard deviation of a pixel in [0, 1].
    augment
        none, crop-flip (windows of the image padded by an eighth, and flips) or flip-rotate (flips
        and rotations up to 30 degrees).
    root
        Folder for the decoded images; None for $FEDL2P_DATA/huggingface or data/huggingface.
    """

    dataset: str = ""
    subset: str | None = None
    split: str = "train"
    image: str = "image"
    label: str = "label"
    partitioner: str = "IidPartitioner(num_partitions=20)"
    unseen: int = 0
    channels: Literal[1, 3] = 3
    size: tuple[int, int] | None = None
    mean: float = 0.5
    sd: float = 0.5
    augment: Literal["none", "crop-flip", "flip-rotate"] = "none"
    root: Path | None = None

    def __post_init__(self) -> None:
        parse_partitioner(self.partitioner)
        if self.unseen < 0:
            raise ValueError(f"unseen must be 0 or more, got {self.unseen}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 3 (colours) or 1 (grey), got {self.channels}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be height and width of at least 1, got {self.size}")
        if not self.sd > 0:
            raise ValueError(f"sd must be above 0, got {self.sd}")

    def open(self, seed: int) -> SharedPool:
        """Return the population under a seed.

        The first call loads the data set and decodes its images into one file, which every later
        one maps.

        Raises
        ------
        ValueError
            If it cannot be loaded, lacks a column, holds images of several sizes, or a client has
            too few examples.
        """
        if not self.dataset:
            raise ValueError(
                "no data set is named; give its name on the hub or a folder of Parquet files as "
                "--data.dataset NAME"
            )
        root = root_of(NAME, self.root)
        table = load_table(self, root)
        pool = decode_table(self, table, root)
        indices = self._partition(table, seed)
        unseen = self._draw_unseen(list(indices), seed)
        normalise = Normalise(mean=(self.mean,) * self.channels, sd=(self.sd,) * self.channels)
        return SharedPool(
            pool.x,
            torch.from_numpy(pool.column("label")),
            seen={name: indices[name] for name in indices if name not in unseen},
            unseen={name: indices[name] for name in indices if name in unseen},
            classes=len(pool.columns["class"]),
            prepare=normalise,
            augment=self._augment(pool.x.shape[-1], normalise.black),
        )

    def _partition(self, table: datasets.Dataset, seed: int) -> dict[str, ClientIndices]:
        """Return the indices of every client."""
        rest = table.remove_columns([self.image])
        parts = partition(rest, self.partitioner, derive_seed(seed, NAME, "partition") % 2**32)
        indices = {}
        for name, rows in zip(client_names("client", len(parts)), parts, strict=True):
            if len(rows) < 3:
                raise ValueError(
                    f"{name} has {len(rows)} examples, too few to split into training, validation "
                    "and test; use fewer partitions, or another partitioner"
                )
            order = torch.randperm(len(rows), generator=generator(seed, NAME, name, "split"))
            test_end = max(1, round(0.2 * len(rows)))
            validation_end = test_end + max(1, round(0.2 * (len(rows) - test_end)))
            shuffled = rows[order]
            indices[name] = ClientIndices(
                train=shuffled[validation_end:],
                validation=shuffled[test_end:validation_end],
                test=shuffled[:test_end],
            )
        return indices

    def _draw_unseen(self, names: list[str], seed: int) -> set[str]:
        if self.unseen >= len(names):
            raise ValueError(
                f"unseen is {self.unseen}, but there are only {len(names)} clients; leave at least "
                "one to learn from"
            )
        order = torch.randperm(len(names), generator=generator(seed, NAME, "unseen")).tolist()
        return {names[i] for i in order[: self.unseen]}

    def _augment(self, width: int, black: tuple[float, ...]) -> Augment | None:
        if self.augment == "crop-flip":
            return CropAndFlip(padding=max(1, width // 8), black=black)
        return FlipAndRotate(black=black) if self.augment == "flip-rotate" else None


def load_table(source: HuggingFace, root: Path) -> datasets.Dataset:
    """Return the split, its images not decoded.

    Raises
    ------
    ValueError
        If it cannot be loaded or lacks a column.
    """
    with needs("datasets"):
        import datasets
    local = Path(source.dataset)
    if local.is_dir() and not any(local.rglob("*.parquet")):
        raise ValueError(f"{local} holds no .parquet file; name a folder that does")
    if not local.is_dir() and source.dataset.startswith((".", "/", "~")):
        raise ValueError(f"{local} is not a folder; name one that holds .parquet files")
    try:
        with _quiet(datasets):
            table = datasets.load_dataset(
                str(local.resolve()) if local.is_dir() else source.dataset,
                source.subset,
                split=source.split,
                cache_dir=str(root / "cache" / "arrow"),
            )
    except Exception as problem:  # of many libraries, with no common base
        innermost: BaseException = problem
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        why = " ".join(str(innermost).split())[:300]
        raise ValueError(
            f"cannot load the data set {source.dataset!r} ({type(innermost).__name__}: {why}); "
            "check its name, subset and split, and that its files are whole"
        ) from None
    for column in (source.image, source.label):
        if column not in table.column_names:
            names = ", ".join(table.column_names)
            raise ValueError(f"{source.dataset} has no column {column!r}; there are {names}")
    try:
        return table.cast_column(source.image, datasets.Image(decode=False))
    except Exception:
        raise ValueError(
            f"column {source.image!r} of {source.dataset} holds {table.features[source.image]}, "
            "not images; name another as --data.image"
        ) from None


def decode_table(source: HuggingFace, table: datasets.Dataset, root: Path) -> DecodedExamples:
    """Return all images, with the columns ``label`` and ``class`` (the names of the classes).

    Raises
    ------
    ValueError
        If an image cannot be read, or has another size than the others.
    """

    def build(allocate: Allocate) -> Columns:
        labels, classes = _labels(source, table)
        x: np.ndarray | None = None
        images = decode_all(_contents(source, table), size=source.size, channels=source.channels)
        for i, image in enumerate(images):
            if x is None:
                x = allocate((len(table), *image.shape), np.uint8)
            if image.shape != x.shape[1:]:
                raise ValueError(
                    f"image {i} of {source.dataset} is {image.shape[1]} x {image.shape[2]}, the "
                    f"first {x.shape[2]} x {x.shape[3]}; give a size for all, e.g. --data.size "
                    f"{x.shape[2]} {x.shape[3]}"
                )
            x[i] = image
        return {"label": labels, "class": classes}

    files = [Path(file["filename"]) for file in table.cache_files]
    settings = (source.dataset, source.subset, source.split, source.image, source.label)
    key = {
        "files": fingerprint(files),
        "settings": settings,
        "size": source.size,
        "channels": source.channels,
    }
    place = f"{derive_seed(*map(str, settings), str(source.size), source.channels):016x}"
    return open_cache(root / "cache" / place, key=key, build=build)


def _contents(source: HuggingFace, table: datasets.Dataset) -> Iterator[tuple[str, bytes]]:
    for i, row in enumerate(table.select_columns([source.image])):
        file = row[source.image] or {}
        content = file.get("bytes")
        if content is None and file.get("path"):
            content = Path(file["path"]).read_bytes()
        if content is None:
            raise ValueError(f"example {i} of {source.dataset} has no image; remove it")
        yield f"image {i} of {source.dataset}", content


def _labels(source: HuggingFace, table: datasets.Dataset) -> tuple[list[int], list[str]]:
    """Return the label of every example, and the names of the classes."""
    labels = list(table[source.label])
    if not labels:
        raise ValueError(f"split {source.split!r} of {source.dataset} is empty; name another")
    if all(isinstance(label, str) for label in labels):
        classes = sorted(set(labels))
        numbers = {name: i for i, name in enumerate(classes)}
        return [numbers[label] for label in labels], classes
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        wrong = next(v for v in labels if not isinstance(v, int) or v < 0)
        raise ValueError(
            f"column {source.label!r} of {source.dataset} holds {wrong!r}; labels must all be text "
            "or all be integers from 0"
        )
    names = getattr(table.features[source.label], "names", None)
    classes = list(names) if names else [str(i) for i in range(max(labels) + 1)]
    return [int(label) for label in labels], classes


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Switch the library's progress bars off."""
    if library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()
