"""Rows of a method whose clients are personalized, stored until the run is finished."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedl2p.runs.files import LARGEST_TABLE, read_fields, write_atomically
from fedl2p.runs.results import Row


@dataclass(frozen=True, kw_only=True)
class PersonalizedClients:
    """All clients of a run, personalized by one method.

    Parameters
    ----------
    rows
        One per client.
    seconds
        Wall-clock seconds that personalization took.
    """

    rows: tuple[Row, ...]
    seconds: float

    def write(self, path: Path) -> None:
        """Write a file of a run's checkpoint; its folder is made if there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> PersonalizedClients:
        """Read what :meth:`write` wrote.

        Raises
        ------
        ValueError
            If the file is missing or damaged.
        """
        return read_fields(path, cls, limit=LARGEST_TABLE)
