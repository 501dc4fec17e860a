"""Photographs of the same classes from several domains, by FedBN's lists of files.

X. Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR
2021, https://arxiv.org/abs/2102.07623, publish for Office-Caltech-10 and DomainNet one pickle per
domain and part, ``DOMAIN_train.pkl`` and ``DOMAIN_test.pkl``: a pair (paths, names of classes).
Images are decoded to three channels and resized to 256 x 256. Images that have no three channels
are read in their colours; FedBN's own code makes these few grey.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedl2p.data.files.archives import ZipTree
from fedl2p.data.files.cache import Allocate, Cached, Columns, cached, fingerprint
from fedl2p.data.files.folders import missing
from fedl2p.data.files.images import decode_all
from fedl2p.data.files.plain_pickle import load_plain
from fedl2p.data.pools.augmentation import FlipAndRotate
from fedl2p.data.pools.dealing import Holding
from fedl2p.data.pools.partition import stratified_split
from fedl2p.data.pools.shared_pool import Normalise, SharedPool
from fedl2p.seeds import generator

SIZE = (256, 256)

NORMALISE = Normalise(mean=(0.485, 0.456, 0.406), sd=(0.229, 0.224, 0.225))
"""ImageNet's, since the models come from there."""

VALIDATION_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Domains:
    """A data set of this kind.

    Parameters
    ----------
    name
        As on the command line.
    inner
        The folder that its archives unpack to, with which the listed paths begin.
    lists
        The archive with the pickles.
    images
        Further archives with images.
    domains
        Names of the domains, in order.
    classes
        Names of the classes as they are listed, in order.
    """

    name: str
    inner: str
    lists: str
    images: tuple[str, ...]
    domains: tuple[str, ...]
    classes: tuple[str, ...]

    def tree(self, root: Path) -> ZipTree:
        """Return the files of the data set's folder.

        Raises
        ------
        ValueError
            If the lists are not there.
        """
        tree = ZipTree(root, self.inner, (self.lists, *self.images))
        if tree.find(f"{self.domains[0]}_train.pkl", source=root) is None:
            raise missing(root / self.lists, self.name)
        return tree

    def load(self, root: Path) -> Cached:
        """Return all listed images, with the columns ``label``, ``domain`` and ``test`` (0 or 1).

        Raises
        ------
        ValueError
            If something is missing, damaged, or not plain data.
        """
        tree = self.tree(root)
        files = [*tree.archives, *self._list_files(tree)]

        def build(allocate: Allocate) -> Columns:
            listed = [row for rows in self.listed(tree).values() for row in rows]
            x = allocate((len(listed), 3, *SIZE), np.uint8)
            for i, image in enumerate(decode_all(contents(tree, listed), size=SIZE)):
                x[i] = image
            return {
                "label": [row.label for row in listed],
                "domain": [row.domain for row in listed],
                "test": [int(row.part == "test") for row in listed],
            }

        key = {"files": fingerprint(files), "size": SIZE}
        return cached(root / "cache" / "all", key=key, build=build)

    def listed(self, tree: ZipTree) -> dict[str, list[Listed]]:
        """Return what each pickle lists, by the pickle's name.

        Raises
        ------
        ValueError
            If a pickle is missing, damaged or not plain data, or a training list lacks a class.
        """
        lists = {}
        for number, domain in enumerate(self.domains):
            for part in ("train", "test"):
                pickle = f"{domain}_{part}.pkl"
                source = f"{tree.root}: {pickle}"
                pair = load_plain(tree.read(pickle, source=self.name), source=source)
                rows = [
                    Listed(path, label, number, part, source)
                    for path, label in self._pairs(pair, source)
                ]
                if part == "train":
                    self._check_classes({row.label for row in rows}, source)
                lists[pickle] = rows
        return lists

    def _pairs(self, pair: object, source: str) -> Iterator[tuple[str, int]]:
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

    def _list_files(self, tree: ZipTree) -> list[Path]:
        """Return the pickles that lie in folders."""
        names = [f"{domain}_{part}.pkl" for domain in self.domains for part in ("train", "test")]
        places = [tree.find(name, source=self.name) for name in names]
        return [place for place in places if isinstance(place, Path)]

    def check(self, root: Path) -> list[str]:
        """Return what is missing or damaged: every listed image is looked up and decoded."""
        try:
            tree = self.tree(root)
        except ValueError as problem:
            return [str(problem)]
        try:
            lists = self.listed(tree)
        except ValueError as problem:
            return [str(problem)]
        problems = []
        for pickle, rows in lists.items():
            here = [row for row in rows if tree.find(row.path, source=pickle) is not None]
            if len(here) < len(rows):
                there = set(here)
                gone = next(row.path for row in rows if row not in there)
                problems.append(
                    f"{len(rows) - len(here)} of {len(rows)} images that {pickle} lists are "
                    f"missing in {root}, e.g. {gone}; fedl2p data get {self.name} says where "
                    "they come from"
                )
            try:
                for _ in decode_all(contents(tree, here), size=None):
                    pass
            except ValueError as problem:
                problems.append(str(problem))
        return problems


@dataclass(frozen=True)
class Listed:
    """One line of a list; ``label`` and ``domain`` are numbers, ``part`` is train or test."""

    path: str
    label: int
    domain: int
    part: str
    source: str


def contents(tree: ZipTree, listed: list[Listed]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each listed file."""
    for row in listed:
        yield f"{tree.root}: {row.path}", tree.read(row.path, source=row.source)


def split_domains(
    pool: Cached, domains: tuple[str, ...], *, seed: int, name: str
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
    groups = {}
    for number, (group, own) in enumerate(zip(domains, train, strict=True)):
        order = torch.randperm(len(own), generator=generator(seed, name, group, "equal"))
        kept = torch.from_numpy(own)[order[:smallest]]
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
        groups[group] = (kept[first], kept[second], tests)
    return groups


def population(
    pool: Cached, classes: int, seen: Mapping[str, Holding], unseen: Mapping[str, Holding]
) -> SharedPool:
    """Return the clients over the decoded images."""
    return SharedPool(
        pool.x,
        torch.from_numpy(pool.column("label")),
        seen=seen,
        unseen=unseen,
        classes=classes,
        prepare=NORMALISE,
        augment=FlipAndRotate(degrees=30, black=NORMALISE.black),
    )
