"""The page of one explanation: one file that opens offline."""

from __future__ import annotations

from fedl2p.explain.explanation import Explanation
from fedl2p.explain.figures import attribution_map
from fedl2p.explain.sentences import (
    HEADS,
    exactness,
    headline,
    known,
    row,
    sentences,
    typical_client,
)
from fedl2p.reporting.page import render


def render_explanation(explanation: Explanation) -> str:
    """Return the page as HTML. It loads nothing from outside itself."""
    found = explanation.attribution
    return render(
        "explanation.html",
        {
            "explanation": explanation,
            "known": known(explanation),
            "headline": headline(explanation),
            "typical": typical_client(explanation),
            "statements": sentences(explanation),
            "figure": attribution_map(explanation),
            "heads": HEADS,
            "rows": [row(one, found) for one in (*found.mixes, *found.rates)],
            "exactness": exactness(explanation),
            "log": found.rates[0].log,
        },
    )
