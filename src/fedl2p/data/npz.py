"""Clients from .npz files: a folder with one file per client.

If the folder has the sub-folders ``seen`` and ``unseen``, the files in them are those clients;
otherwise all its files are seen clients. :mod:`fedl2p.data.files.npz_client` describes a file.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from fedl2p.core import trees
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.data.files.npz_client import MAX_BYTES, MAX_CLASSES, first_shape, read_npz_client
from fedl2p.data.pools.client_cache import ClientCache
from fedl2p.data.pools.partition import label_entropy
from fedl2p.data.population import Population, num_outputs


@dataclass(frozen=True)
class NpzFolder:
    """A folder of .npz files, one per client.

    Parameters
    ----------
    path
        The folder: either .npz files, all seen clients, or sub-folders seen and unseen. None only
        until one is named.
    classes
        Number of classes; 0 for the largest label of all clients plus one or, where targets are
        floating numbers, the number of these per example.
    max_bytes
        Most bytes that the arrays of one client may take as they are stored, unpacked; a larger
        file is refused unread.
    """

    path: Path | None = None
    _: KW_ONLY
    classes: int = 0
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))
        if not 0 <= self.classes <= MAX_CLASSES:
            raise ValueError(
                f"classes must be 0 (from the labels) to {MAX_CLASSES}, got {self.classes}"
            )
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}, but must be 1 or more")

    def open(self, seed: int) -> NpzPopulation:
        """Return the population; every file is read and checked once, none is kept in memory.

        The files and their splits are the same under every seed.

        Raises
        ------
        ValueError
            If no folder is named, it has no clients, or a file is malformed or unlike the others;
            one line that names the file and says what to do.
        """
        if self.path is None:
            raise ValueError(
                "no folder of clients is named; give the one that holds their .npz files as "
                "--data.path DIR (in Python NpzFolder(DIR))"
            )
        return NpzPopulation(self.path, classes=self.classes, max_bytes=self.max_bytes)


class NpzPopulation(Population):
    """The clients of an :class:`NpzFolder`, named like their files, in alphabetical order."""

    def __init__(self, folder: Path, *, classes: int = 0, max_bytes: int = MAX_BYTES) -> None:
        seen, unseen = _find_files(folder)
        self.seen = tuple(file.stem for file in seen)
        self.unseen = tuple(file.stem for file in unseen)
        self._files = {file.stem: file for file in (*seen, *unseen)}
        self._cache = ClientCache(self._read)
        # The first file sets the shape that the others are compared with.
        self._max_bytes = max_bytes
        self.shape = first_shape(read_npz_client(seen[0], max_bytes=max_bytes).train)
        most = 0
        targets: set[Hashable] = set()
        for file in self._files.values():
            data = read_npz_client(
                file, shape=self.shape, classes=classes or None, max_bytes=max_bytes
            )
            most = max(most, *(num_outputs(part.y) for part in _parts(data)))
            targets.add(trees.kind(data.train.y))
            if len(targets) > 1:
                raise ValueError(
                    f"{file}: its targets are {trees.describe(data.train.y)}, of another shape or "
                    f"type than those of {seen[0].name}; give all clients targets of one kind"
                )
        self.classes = classes or most

    def open(self, name: str) -> ClientData:
        """Return the data of one client, see :func:`read_npz_client`."""
        if name not in self._files:
            raise KeyError(f"there is no client {name!r}; a client has the name of its .npz file")
        return self._cache(name)

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return the entropy of the client's training labels, in nats; nothing of other targets."""
        y = self.open(name).train.y
        if not isinstance(y, torch.Tensor) or y.dim() != 1 or y.is_floating_point():
            return {}
        return {"label_entropy": round(label_entropy(y), 4)}

    def _read(self, name: str) -> ClientData:
        return read_npz_client(
            self._files[name], shape=self.shape, classes=self.classes, max_bytes=self._max_bytes
        )


def _find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of the seen and of the unseen clients, each in alphabetical order."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one that holds .npz files")
    loose = _npz_files(folder)
    pools = [_npz_files(folder / pool) for pool in ("seen", "unseen")]
    if not any(pools):
        pools = [loose, []]
    elif loose:
        raise ValueError(
            f"{loose[0]} lies beside the sub-folders seen and unseen; move it into one of them"
        )
    seen, unseen = pools
    if not seen:
        raise ValueError(
            f"{folder} has no seen clients; put one .npz file per client into it or into "
            f"{folder / 'seen'}"
        )
    both = {file.stem for file in seen} & {file.stem for file in unseen}
    if both:
        raise ValueError(
            f"{folder / 'unseen' / min(both)}.npz has the name of a seen client; rename one"
        )
    return seen, unseen


def _npz_files(folder: Path) -> list[Path]:
    """Return the .npz files of a folder, sorted, without hidden ones (a Mac's ``._c0.npz``)."""
    files = sorted(file for file in folder.glob("*.npz") if not file.name.startswith("."))
    for file in files:
        if not file.stem.isprintable():  # neither are bytes that are not UTF-8
            raise ValueError(
                f"{str(file)!a}: a client is called like its file, and this name is not printable "
                "text in UTF-8; rename the file"
            )
    return files


def _parts(data: ClientData) -> list[Examples]:
    return [part for part in (data.train, data.validation, data.test) if part is not None]
