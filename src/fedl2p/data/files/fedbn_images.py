"""Photographs from several domains, as FedBN publishes them: lists of files, and zip archives.

X. Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR
2021, https://arxiv.org/abs/2102.07623, publish for Office-Caltech-10 and DomainNet one pickle per
domain and part, ``DOMAIN_train.pkl`` and ``DOMAIN_test.pkl``: a pair (paths, names of classes).
Images are decoded to three channels and resized to 256 x 256. Images without three channels are
converted to RGB; FedBN's own code makes these few grey.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedl2p.data.files.archives import ZipTree
from fedl2p.data.files.cache import Allocate, Columns, DecodedExamples, fingerprint, open_cache
from fedl2p.data.files.folders import missing
from fedl2p.data.files.images import decode_all
from fedl2p.data.files.plain_pickle import load_plain

SIZE = (256, 256)


@dataclass(frozen=True, kw_only=True)
class FedBNImages:
    """A data set in FedBN's form.

    Parameters
    ----------
    name
        As on the command line.
    inner
        The folder in its archives, with which the listed paths begin.
    lists
        The archive with the pickles.
    images
        Further archives with images.
    domains
        Names of the domains, in order.
    classes
        Names of the classes in the lists, in order.
    """

    name: str
    inner: str
    lists: str
    images: tuple[str, ...]
    domains: tuple[str, ...]
    classes: tuple[str, ...]

    def load(self, root: Path) -> DecodedExamples:
        """Return all listed images, with the columns ``label``, ``domain`` and ``test`` (0 or 1).

        Raises
        ------
        ValueError
            If something is missing, damaged, or not plain data.
        """
        tree = self._tree(root)

        def build(allocate: Allocate) -> Columns:
            rows = [row for rows in self._read_lists(tree).values() for row in rows]
            x = allocate((len(rows), 3, *SIZE), np.uint8)
            for i, image in enumerate(decode_all(_contents(tree, rows), size=SIZE)):
                x[i] = image
            return {
                "label": [row.label for row in rows],
                "domain": [row.domain for row in rows],
                "test": [int(row.part == "test") for row in rows],
            }

        pickles = [tree.find(name, source=self.name) for name in self._pickles()]
        files = [*tree.archives, *(place for place in pickles if isinstance(place, Path))]
        key = {"files": fingerprint(files), "size": SIZE}
        return open_cache(root / "cache" / "all", key=key, build=build)

    def check(self, root: Path) -> list[str]:
        """Return what is missing or damaged: every listed image is looked up and decoded."""
        try:
            tree = self._tree(root)
            lists = self._read_lists(tree)
        except ValueError as problem:
            return [str(problem)]
        problems = []
        for pickle, rows in lists.items():
            places = [tree.find(row.path, source=pickle) for row in rows]
            present = [row for row, place in zip(rows, places, strict=True) if place is not None]
            absent = [row for row, place in zip(rows, places, strict=True) if place is None]
            if absent:
                problems.append(
                    f"{len(absent)} of {len(rows)} images that {pickle} lists are missing in "
                    f"{root}, e.g. {absent[0].path}; fedl2p data get {self.name} says where they "
                    "come from"
                )
            try:
                for _ in decode_all(_contents(tree, present), size=None):
                    pass
            except ValueError as problem:
                problems.append(str(problem))
        return problems

    def _pickles(self) -> dict[str, tuple[int, str]]:
        """Return the number of the domain, and the part, of each pickle by its name."""
        return {
            f"{domain}_{part}.pkl": (number, part)
            for number, domain in enumerate(self.domains)
            for part in ("train", "test")
        }

    def _tree(self, root: Path) -> ZipTree:
        tree = ZipTree(root, self.inner, (self.lists, *self.images))
        if tree.find(next(iter(self._pickles())), source=root) is None:
            raise missing(root / self.lists, self.name)
        return tree

    def _read_lists(self, tree: ZipTree) -> dict[str, list[_ListedImage]]:
        """Return the rows of each pickle, by the pickle's name."""
        lists = {}
        for pickle, (domain, part) in self._pickles().items():
            source = f"{tree.root}: {pickle}"
            pair = load_plain(tree.read(pickle, source=self.name), source=source)
            lists[pickle] = [
                _ListedImage(path, label, domain, part, source)
                for path, label in self._pairs(pair, source)
            ]
            if part == "train":
                self._check_classes({row.label for row in lists[pickle]}, source)
        return lists

    def _pairs(self, pair: object, source: str) -> Iterator[tuple[str, int]]:
        """Yield path and label of each row, checked."""
        columns = [list(c) for c in pair] if isinstance(pair, (list, tuple)) else []
        if len(columns) != 2 or len(columns[0]) != len(columns[1]) or not columns[0]:
            raise ValueError(
                f"{source} is not a pair of paths and equally many names of classes; fetch "
                f"{self.lists} again"
            )
        for path, label in zip(*columns, strict=True):
            if not isinstance(path, str) or label not in self.classes:
                raise ValueError(
                    f"{source} lists {path!r} as {label!r}; wanted a path and one of "
                    f"{', '.join(self.classes)}"
                )
            yield str(path), self.classes.index(label)

    def _check_classes(self, labels: set[int], source: str) -> None:
        for number, name in enumerate(self.classes):
            if number not in labels:
                raise ValueError(
                    f"{source} lists no image of class {name}; fetch {self.lists} again"
                )


@dataclass(frozen=True)
class _ListedImage:
    """A row of a list; ``label`` and ``domain`` are numbers, ``part`` is train or test."""

    path: str
    label: int
    domain: int
    part: str
    source: str


def _contents(tree: ZipTree, rows: list[_ListedImage]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each listed file."""
    for row in rows:
        yield f"{tree.root}: {row.path}", tree.read(row.path, source=row.source)
