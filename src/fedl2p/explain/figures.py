"""The figure of an explanation: every profile entry against every hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence

from fedl2p.explain.attribution import Explained
from fedl2p.explain.explanation import Explanation
from fedl2p.explain.sentences import amount, entry_numbers
from fedl2p.reporting.heat_maps import BLUE_TO_ORANGE, HeatMap, Rows, draw_maps, head_height
from fedl2p.reporting.svg import (
    COLOURS,
    LONGEST_NAME,
    SMALL,
    add_axes,
    house_style,
    inline_svg,
    shorten,
    write,
)

MOST_ROWS = 40
WIDTH = 900.0
ROW = 20.0


@house_style()
def attribution_map(explanation: Explanation) -> str:
    """Return heat maps of the attributions to mixes and to rates, and each entry's share."""
    rows = _row_entries(explanation)
    maps = [_heat_map(kind, [entries for _, entries in rows]) for kind in explanation.kinds]
    head = max(head_height(one.columns) for one in maps)
    layout = Rows([name for name, _ in rows], [len(rows)], ROW)
    figure, left = draw_maps(maps, layout, head=head, width=WIDTH, beside=130.0)
    shares = [100 * sum(explanation.shares[i] for i in entries) for _, entries in rows]
    axes = add_axes(figure, left, head, 80, layout.bottom)
    axes.barh(layout.middles, shares, height=ROW - 6, color=COLOURS["quiet"], clip_on=False)
    axes.set(ylim=(layout.bottom, 0), xlim=(0, max(shares) or 1), yticks=[], xticks=[])
    for share, middle in zip(shares, layout.middles, strict=True):
        width = 80 * share / (max(shares) or 1)
        write(axes, width + 5, middle, f"{share:.0f} %", size=SMALL, va="center_baseline")
    write(axes, 0, 14 - head, "Share", weight="bold")
    write(axes, 0, 28 - head, "of all movement", size=SMALL, colour="quiet")
    said = [f"{name} {share:.0f} %" for (name, _), share in zip(rows, shares, strict=True)]
    return inline_svg(
        figure,
        name="attributions",
        label="Heat maps: what each profile entry added to each mix and each rate",
        description=f"Shares of all movement: {'; '.join(said)}.",
    )


def _row_entries(explanation: Explanation) -> list[tuple[str, list[int]]]:
    """Return each row's name and entries, the largest share first and the smallest as one row."""
    rows = []
    for i in explanation.ranking[:MOST_ROWS]:
        entry = explanation.attribution.entries[i]
        rows.append((f"{shorten(entry.name, LONGEST_NAME + 8)}: {entry_numbers(entry)}", [i]))
    rest = explanation.ranking[MOST_ROWS:]
    return [*rows, (f"{len(rest)} other entries", rest)] if rest else rows


def _heat_map(kind: Sequence[Explained], rows: Sequence[Sequence[int]]) -> HeatMap:
    from matplotlib.colors import Normalize

    values = [[sum(one.attributions[i] for i in row) for one in kind] for row in rows]
    most = max((abs(value) for line in values for value in line), default=0.0) or 1.0
    mix = kind[0].kind == "mix"
    return HeatMap(
        title="To each mix" if mix else "To each rate",
        unit="added" if mix or not kind[0].log else "factor",
        columns=[one.name for one in kind],
        values=values,
        colours=BLUE_TO_ORANGE,
        norm=Normalize(-most, most),
        ends=(amount(kind[0], -most), amount(kind[0], most)),
    )
