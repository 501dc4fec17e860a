"""The global models that a node knows, by content hash; on disk too, where a process does not last.

A SuperNode answers every message with a new process. What it has received must lie on its disk, or
the model would travel again with every question.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedl2p.atomic_files import write_tensors
from fedl2p.federation.messages import content_hash
from fedl2p.method import State

log = logging.getLogger("fedl2p")

# A study has two: the initial and the pre-trained one.
_REMEMBERED = 4

_KEY = re.compile(r"[0-9a-f]{32}")


class ReceivedModels:
    """At most four models; the oldest gives way.

    Parameters
    ----------
    folder
        Where models are kept as ``<hash>.safetensors``; None for memory alone.

    Attributes
    ----------
    known
        The models in memory, by hash.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.known: dict[str, State] = {}

    def __iter__(self) -> Iterator[str]:
        """Yield the hashes of the models, those in memory first."""
        yield from self.known
        for file in self._files():
            if file.stem not in self.known:
                yield file.stem

    def add(self, weights: State, *, lasting: bool = True) -> str:
        """Keep a copy of a model's weights and return their content hash.

        ``lasting`` is False for a model that every process can make again, which needs no file.

        Raises
        ------
        OSError
            If the folder cannot be written.
        """
        key = content_hash(weights)
        if key not in self.known:
            while len(self.known) >= _REMEMBERED:
                del self.known[next(iter(self.known))]
            self.known[key] = {name: t.detach().clone() for name, t in weights.items()}
        if lasting and self.folder is not None and not self._file(key).exists():
            self._write(key)
        return key

    def get(self, key: str) -> State | None:
        """Return the weights of a model, or None if it is not here.

        A file whose content does not have its hash (a damaged disk) is removed and not here.
        """
        if key not in self.known and self.folder is not None and _KEY.fullmatch(key):
            file = self._file(key)
            try:
                weights = load_file(file) if file.exists() else None
            except (OSError, SafetensorError) as error:
                log.warning("%s cannot be read (%s)", file, error)
                weights = {}
            if weights is not None and content_hash(weights) != key:
                log.warning("%s is damaged; asking for that model again", file)
                file.unlink(missing_ok=True)
            elif weights is not None:
                self.add(weights)
        return self.known.get(key)

    def _write(self, key: str) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._file(key), self.known[key])
        for old in self._files()[:-_REMEMBERED]:
            old.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _files(self) -> list[Path]:
        """Return the files of models, the oldest first."""
        if self.folder is None or not self.folder.is_dir():
            return []
        files = [f for f in self.folder.glob("*.safetensors") if _KEY.fullmatch(f.stem)]
        return sorted(files, key=lambda file: file.stat().st_mtime_ns)
