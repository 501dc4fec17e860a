"""Cross-validation over clients: a part of the seen clients is held out and comes afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Annotated

import torch

from fedl2p.core.clientdata import ClientData
from fedl2p.data.population import Population
from fedl2p.runs.config import AnyKind
from fedl2p.seeds import generator
from fedl2p.study.settings import Source


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The seen clients of a source, some of which are held out: these are unseen ones now.

    The seed determines which; every client is held out in one of the folds. Unseen clients of the
    source are left out.

    Parameters
    ----------
    of
        The source.
    fold
        Which part is held out, from 0 to folds - 1.
    folds
        Number of parts, as equal in size as they can be.
    """

    of: Annotated[Source, AnyKind()]
    fold: int
    folds: int

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(
                f"folds is {self.folds}, but must be 2 or more: what is learned on the clients of "
                "the others is tried on those of one"
            )
        if not 0 <= self.fold < self.folds:
            raise ValueError(f"fold is {self.fold}, but must be from 0 to {self.folds - 1}")

    def open(self, seed: int) -> Population:
        """Return the population of this fold.

        Raises
        ------
        ValueError
            If there are fewer seen clients than folds.
        """
        whole = self.of.open(seed)
        if len(whole.seen) < self.folds:
            raise ValueError(
                f"folds is {self.folds}, but there are only {len(whole.seen)} seen clients, of "
                "which each fold needs one; use fewer folds, or more clients"
            )
        # Clients of a kind may come at regular distances, as the folds would.
        order = torch.randperm(len(whole.seen), generator=generator("folds", seed)).tolist()
        return _Fold(whole, {whole.seen[i] for i in order[self.fold :: self.folds]})


class _Fold(Population):
    """The seen clients of a population, of which some are unseen ones now."""

    def __init__(self, whole: Population, held_out: Set[str]) -> None:
        self._whole = whole
        self.seen = tuple(name for name in whole.seen if name not in held_out)
        self.unseen = tuple(name for name in whole.seen if name in held_out)
        self.classes, self.shape = whole.classes, whole.shape

    def open(self, name: str) -> ClientData:
        """Return the data of one client."""
        return self._whole.open(name)

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return the description of a client."""
        return self._whole.about(name)

    def pretraining(self) -> Population | None:
        """Return the population that the global model is pre-trained on."""
        return self._whole.pretraining()
