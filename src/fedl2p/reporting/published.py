"""The accuracies that the paper states in its summary, to stand beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass

from fedl2p.runs.results import Pool

SOURCE = "R. Lee et al., FedL2P, NeurIPS 2023, arXiv 2310.02420"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published accuracy.

    Parameters
    ----------
    recipe, cell, pool
        Which column of which table: a recipe, the label of its cell, a pool of clients.
    method
        Which row: the name of a method here; where the paper's summary does not say which of
        ours it is, a name that none has.
    percent
        Fraction of the test samples, in percent.
    """

    recipe: str
    cell: str = ""
    pool: Pool = "seen"
    method: str
    percent: float


FIGURES = (
    Figure(recipe="speech", pool="unseen", method="fedl2p", percent=87.85),
    Figure(recipe="speech", pool="unseen", method="finetuning-client", percent=62.76),
    Figure(recipe="cifar10", cell="alpha 0.1", method="fedl2p", percent=80.28),
    Figure(recipe="cifar10", cell="alpha 0.1", method="fedbabu", percent=79.58),
    Figure(recipe="cifar10", cell="alpha 0.1", method="perfedavg", percent=77.68),
    Figure(recipe="office10", method="fedl2p", percent=88.85),
    # Its statistics are not stated, so it stands for neither finetuning-client nor -global.
    Figure(recipe="office10", method="Fine-tuning, statistics not stated", percent=80.97),
)
"""All that is at hand; no other may be quoted."""


def figures(recipe: str, cell: str, pool: Pool) -> dict[str, float]:
    """Return the published accuracies of one column by method, in percent."""
    column = (recipe, cell, pool)
    return {f.method: f.percent for f in FIGURES if (f.recipe, f.cell, f.pool) == column}
