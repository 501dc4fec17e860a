"""Accuracies that the paper states in its summary, to stand beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass

from fedl2p.runs.results import Pool

SOURCE = "R. Lee et al., FedL2P, NeurIPS 2023, arXiv 2310.02420"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published accuracy.

    Parameters
    ----------
    recipe, cell, pool
        The column of a table: a recipe, the label of its cell, a pool of clients.
    method
        The row: a method's name in this package, or a name that none has where the paper's summary
        does not say which one it is.
    percent
        Of the test samples.
    """

    recipe: str
    cell: str = ""
    pool: Pool = "seen"
    method: str
    percent: float


PUBLISHED = (
    Published(recipe="speech", pool="unseen", method="fedl2p", percent=87.85),
    Published(recipe="speech", pool="unseen", method="finetuning-client", percent=62.76),
    Published(recipe="cifar10", cell="alpha 0.1", method="fedl2p", percent=80.28),
    Published(recipe="cifar10", cell="alpha 0.1", method="fedbabu", percent=79.58),
    Published(recipe="cifar10", cell="alpha 0.1", method="perfedavg", percent=77.68),
    Published(recipe="office10", method="fedl2p", percent=88.85),
    # Its statistics are not stated, so it stands for neither finetuning-client nor -global.
    Published(recipe="office10", method="Fine-tuning, statistics not stated", percent=80.97),
)
"""All that the summary states; no other may be quoted."""


def published_accuracies(recipe: str, cell: str, pool: Pool) -> dict[str, float]:
    """Return the published accuracies of one column by method, in percent."""
    column = (recipe, cell, pool)
    return {p.method: p.percent for p in PUBLISHED if (p.recipe, p.cell, p.pool) == column}
