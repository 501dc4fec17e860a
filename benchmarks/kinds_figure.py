"""Draw what one setting loses and what FedL2P gains, kind by kind, and what it chose for each.

Reads the rows "searches" and "FedL2P" of kinds-main-RECIPE.jsonl (see kinds.py), unseen clients.

    python benchmarks/kinds.py main kinds --seeds 202-211
    python benchmarks/kinds_figure.py kinds
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from kinds import FEDL2P, SEARCHES, Result, read
from strategies import Row

from fedl2p import models
from fedl2p.core.sites import find_sites

SINGLE = "#d1852b"
OWN = "#2f7fd1"
INK = "#768390"  # readable on white and on black: the page behind it may be either
WORDS = {
    "sensor": "a sensor",
    "swapped-codes": "swapped codes",
    "two-classes": "two classes",
    "clean": "nothing special",
    "tiny": "few images",
    "noisy-labels": "noisy labels",
}


def of_kind(results: Sequence[Result], row: str, kind: str) -> list[dict]:
    """Return the numbers of the unseen clients of a kind under a row, over all seeds."""
    return [
        c
        for r in results
        if r["row"] == row
        for name, c in r["clients"].items()
        if name.startswith("unseen") and c["kind"] == kind
    ]


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="kinds")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures/kinds.svg"))
    options = parser.parse_args()
    results = read(options.results / f"kinds-main-{options.recipe}.jsonl")
    both = [{r["seed"] for r in results if r["row"] == row} for row in (SEARCHES, FEDL2P)]
    seeds = both[0] & both[1]
    if not seeds:
        raise SystemExit(f"no seed has both rows, {SEARCHES} and {FEDL2P}; run kinds.py main first")
    results = [r for r in results if r["seed"] in seeds]

    study = Row("", base=options.recipe).study(0)
    population = study.data.open(0)
    model = models.build(study.model, shape=population.shape, classes=population.classes, seed=0)
    sites = find_sites(model)
    dims = dict(model.named_parameters())
    norms = len(sites.norms)
    weights = [i for i, name in enumerate(sites.params) if dims[name].dim() > 1]  # no norms, biases

    matplotlib.rcParams.update({
        "svg.hashsalt": "fedl2p",  # the same file from the same results
        "svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    })  # fmt: skip
    figure, (gains, mixes, rates) = plt.subplots(
        1, 3, figsize=(8.8, 4.4), sharey=True, layout="constrained", width_ratios=(2.2, 1, 1.2)
    )
    for place, kind in enumerate(WORDS):
        searched, own = (of_kind(results, row, kind) for row in (SEARCHES, FEDL2P))
        before = statistics.fmean(c["before"] for c in searched)
        for shift, colour, after in (
            (-0.19, SINGLE, statistics.fmean(c["single"] for c in searched)),
            (0.19, OWN, statistics.fmean(c["after"] for c in own)),
        ):
            gain = 100 * (after - before)
            gains.barh(place + shift, gain, 0.36, color=colour)
            gains.annotate(
                f"{gain:+.1f}".replace("-", "\N{MINUS SIGN}"),
                (gain, place + shift),
                xytext=(4 if gain >= 0 else -4, 0),
                textcoords="offset points",
                ha="left" if gain >= 0 else "right",
                va="center",
                color=colour,
                size=10,
            )
        written = [c for c in own if c.get("mix") is not None]
        for axis, values in (
            (
                mixes,
                [statistics.fmean(c["mix"][i] for c in written) for i in range(norms)],
            ),
            (
                rates,
                [
                    math.exp(statistics.fmean(math.log(max(c["rate"][i], 1e-5)) for c in written))
                    for i in weights
                ],
            ),
        ):
            axis.plot(values, [place] * len(values), color=OWN, lw=1, alpha=0.5)
            for depth, value in enumerate(values):
                size = 30 + 40 * depth / max(1, len(values) - 1)
                axis.scatter(value, place, s=size, color=OWN, alpha=(depth + 2) / (len(values) + 1))
    gains.set_yticks(range(len(WORDS)), WORDS.values())
    gains.invert_yaxis()
    gains.axvline(0, color=INK, lw=1)
    gains.margins(x=0.24)
    gains.set_xlabel("accuracy over the global model, points")
    mixes.set_xlim(-0.05, 1.05)
    mixes.set_xticks((0, 1), ("global", "client's"))
    mixes.set_xlabel("statistics")
    rates.set_xscale("log")
    rates.set_xlim(5e-6, 0.5)
    rates.set_xticks((1e-5, 1e-3, 1e-1), ("0.00001", "0.001", "0.1"))
    rates.minorticks_off()
    rates.set_xlabel("learning rate")
    for axis in (gains, mixes, rates):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=0)
    for axis in (mixes, rates):
        axis.grid(axis="x", color=INK, alpha=0.25, lw=0.6)
    gains.set_title("best single setting for all", color=SINGLE, loc="left", size=12)
    gains.set_title("FedL2P", color=OWN, loc="right", size=12, weight="bold")
    words = "what FedL2P chose: small dots first layer, large dots last"
    mixes.set_title(words, color=OWN, size=10, loc="left")
    figure.patch.set_alpha(0)
    for axis in (gains, mixes, rates):
        axis.patch.set_alpha(0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, metadata={"Date": None})
    print(f"{options.out}: {len(seeds)} seeds")


if __name__ == "__main__":
    main()
