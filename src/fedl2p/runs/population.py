"""population.json: who the clients of a run are, the shape of an example, the number of classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedl2p.runs import layout
from fedl2p.runs.client_names import check_name
from fedl2p.runs.files import LARGEST_TABLE, damaged, read_fields, write_atomically
from fedl2p.runs.results import Pool

if TYPE_CHECKING:
    from fedl2p.data.population import Population

LARGEST_SIDE = 1 << 16
MOST_CLASSES = 100_000


@dataclass(frozen=True, kw_only=True)
class ClientInfo:
    """What a run's folder says of one client.

    Parameters
    ----------
    pool
        ``"seen"`` if the client took part in training, else ``"unseen"``.
    about
        What is known of it, e.g. ``{"sensor": "blur", "severity": 0.7}``.
    """

    pool: Pool
    about: Mapping[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class PopulationInfo:
    """The content of population.json.

    Parameters
    ----------
    classes
        Number of classes.
    shape
        Shape of one example, without the batch.
    clients
        By name, seen ones first.
    """

    classes: int
    shape: tuple[int, ...]
    clients: Mapping[str, ClientInfo]

    def __post_init__(self) -> None:
        # Models are built of these sizes, and a folder may come from anywhere.
        if not all(0 < size <= LARGEST_SIDE for size in self.shape):
            raise ValueError(f"shape is {str(self.shape)[:80]}, not sizes of 1 to {LARGEST_SIDE}")
        if not 0 < self.classes <= MOST_CLASSES:
            raise ValueError(f"classes is {self.classes}, but must be 1 to {MOST_CLASSES}")

    @classmethod
    def of(cls, population: Population) -> PopulationInfo:
        """Return what a run's folder says of a population.

        Raises
        ------
        ValueError
            If a client's name cannot be that of a file, or stand in one line of the log.
        """
        seen = set(population.seen)
        for name in population.names:
            check_name(name)
        return cls(
            classes=population.classes,
            shape=tuple(population.shape),
            clients={
                name: ClientInfo(
                    pool="seen" if name in seen else "unseen", about=dict(population.about(name))
                )
                for name in population.names
            },
        )

    def write(self, run: Path) -> None:
        """Write population.json into a run's folder."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomically(run / layout.POPULATION, text)

    @classmethod
    def read(cls, run: Path) -> PopulationInfo:
        """Read population.json of a run's folder.

        Raises
        ------
        ValueError
            If the file is missing, or a field is, or is not what it must be.
        """
        info = read_fields(run / layout.POPULATION, cls, limit=LARGEST_TABLE)
        try:
            for name in info.clients:
                check_name(name)
        except ValueError as error:
            raise damaged(run / layout.POPULATION, str(error)) from None
        return info
