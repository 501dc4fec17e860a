"""Draw what the meta-nets learned: mix against divergence, rate against label skew.

Reads the rows "FedL2P" of strategies-final.jsonl (see strategies.py), one dot per client and seed.

    python benchmarks/strategies.py final --seeds 100-109
    python benchmarks/strategy_figure.py
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from scipy.stats import spearmanr

SENSOR, ENTROPY, MIX, LOG_RATE, LOG_DIVERGENCE = 2, 3, 5, 6, 7


def main() -> None:
    """Write the figure and print the rank correlations that stand in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures/strategy.svg"))
    options = parser.parse_args()
    lines = (options.results / "strategies-final.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["row"] == "FedL2P"]
    clients = [numbers for row in rows for numbers in row["clients"].values()]
    kinds = sorted({c[SENSOR] for c in clients})
    colours = plt.get_cmap("tab20").colors
    matplotlib.rcParams["svg.hashsalt"] = "fedl2p"  # the same file from the same results
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for kind, colour in zip(kinds, colours, strict=False):
        own = [c for c in clients if c[SENSOR] == kind]
        style = {"s": 12, "color": colour, "alpha": 0.75, "label": kind}
        left.scatter([math.exp(c[LOG_DIVERGENCE]) for c in own], [c[MIX] for c in own], **style)
        right.scatter([c[ENTROPY] for c in own], [math.exp(c[LOG_RATE]) for c in own], **style)
    by_divergence = spearmanr(
        [c[LOG_DIVERGENCE] for c in clients], [c[MIX] for c in clients]
    ).statistic
    by_skew = spearmanr([c[ENTROPY] for c in clients], [c[LOG_RATE] for c in clients]).statistic
    left.set(
        xscale="log",
        xlabel="divergence, nats (geometric mean over norms)",
        ylabel="mix (mean over norms; 1 = the client's own statistics)",
        title=f"rank correlation {by_divergence:+.2f}",
    )
    right.set(
        yscale="log",
        xlabel="entropy of the client's labels, nats (low = skewed)",
        ylabel="learning rate (geometric mean over tensors)",
        title=f"rank correlation {by_skew:+.2f}",
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", fontsize=8, markerscale=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, metadata={"Date": None})
    print(f"{len(clients)} clients of {len(rows)} seeds: mix and divergence {by_divergence:+.2f}, "
          f"rate and label entropy {by_skew:+.2f}; written to {options.out}")  # fmt: skip


if __name__ == "__main__":
    main()
