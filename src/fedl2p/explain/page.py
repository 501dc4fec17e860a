"""The page of one explanation: one file that opens offline."""

from __future__ import annotations

from fedl2p.explain.explanation import Explained, Explanation
from fedl2p.explain.figures import attribution_map
from fedl2p.explain.sentences import (
    HEADS,
    amount,
    exactness,
    headline,
    known,
    row,
    sentences,
    typical_client,
    value_words,
)
from fedl2p.reporting.page import render


def render_explanation(explanation: Explanation) -> str:
    """Return the page as HTML. It loads nothing from outside itself."""
    every = (*explanation.mixes, *explanation.rates)
    return render(
        "explanation.html",
        {
            "explanation": explanation,
            "known": known(explanation),
            "headline": headline(explanation),
            "typical": typical_client(explanation),
            "cards": [_card(mean) for mean in explanation.means],
            "statements": sentences(explanation),
            "figure": attribution_map(explanation),
            "heads": HEADS,
            "rows": [row(one, explanation.entries) for one in every],
            "exactness": exactness(explanation),
            "log": explanation.rates[0].log,
        },
    )


def _card(mean: Explained) -> dict[str, str]:
    name = f"Mean {mean.kind}{' (geometric)' if mean.log else ''}"
    meaning = (
        "0 = global statistics, 1 = the client's own"
        if mean.kind == "mix"
        else "learning rate of fine-tuning"
    )
    return {
        "title": f"{name}, typical → this client",
        "value": f"{value_words(mean, typical=True)} → {value_words(mean)}",
        "detail": f"{amount(mean, mean.change)}; {meaning}",
    }
