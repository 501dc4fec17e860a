"""The page of one explanation: one file that opens offline."""

from __future__ import annotations

from typing import Any

from fedl2p.explain.explanation import Explanation, Moved
from fedl2p.explain.part_bars import gutter, part_bars
from fedl2p.explain.part_maps import part_maps
from fedl2p.explain.sentences import (
    amount,
    because,
    bound_sentences,
    exactness,
    headline,
    sentences,
    typical_words,
    value_words,
)
from fedl2p.reporting.client_views import describe_about
from fedl2p.reporting.page import render

TEMPLATE = "explanation.html"


def render_explanation(explanation: Explanation) -> str:
    """Return the page as HTML. It loads nothing from outside itself.

    Raises
    ------
    ModuleNotFoundError
        If jinja2 is not installed; the line says how to install it.
    """
    return render(TEMPLATE, explanation_content(explanation))


def explanation_content(explanation: Explanation) -> dict[str, Any]:
    """Return everything that the template shows, in words, numbers and markup."""
    known = "; ".join(x for x in (explanation.pool, describe_about(explanation.about)) if x)
    return {
        "explanation": explanation,
        "known": known,
        "headline": headline(explanation),
        "typical": typical_words(explanation),
        "cards": [_card(moved) for moved in explanation.means],
        "statements": [*sentences(explanation), *bound_sentences(explanation)],
        "exactness": exactness(explanation),
        "gutter": gutter(explanation.entries),
        "bars": [_bars(moved, explanation) for moved in explanation.means],
        "panels": part_maps(explanation) if explanation.entries else [],
        "kinds": [m.kind for m in explanation.means],
        "entries": _entries(explanation),
        "hyperparameters": [
            _line(moved, explanation) for moved in (*explanation.mixes, *explanation.rates)
        ],
        "log": explanation.mean_rate.log,
    }


def _name(moved: Moved) -> str:
    if moved.kind == "mix":
        return "Mean mix"
    return "Mean rate (geometric)" if moved.log else "Mean rate"


def _card(moved: Moved) -> dict[str, str]:
    return {
        "title": f"{_name(moved)}, typical → this client",
        "value": f"{value_words(moved, typical=True)} → {value_words(moved)}",
        "detail": f"{amount(moved, moved.change)}; "
        + (
            "0 = global statistics, 1 = the client's own"
            if moved.kind == "mix"
            else "learning rate per step of fine-tuning"
        ),
    }


def _bars(moved: Moved, explanation: Explanation) -> dict[str, str]:
    unit = "factor on it" if moved.log else "added to it"
    return {
        "heading": _name(moved),
        "note": f"{unit} by each profile entry",
        "markup": part_bars(
            moved,
            explanation.entries,
            label=f"Bars: what each profile entry added to the mean {moved.kind}",
            description=f"The change is {amount(moved, moved.change)}, "
            f"{because(moved, explanation.entries)}.",
        ),
    }


def _entries(explanation: Explanation) -> list[dict[str, Any]]:
    """Return the lines of the profile's table, the largest share first."""
    shares = explanation.shares
    lines = []
    for i in explanation.ranking:
        entry = explanation.entries[i]
        value, typical = entry.numbers
        lines.append(
            {
                "name": entry.name,
                "value": value + entry.unit,
                "typical": typical + entry.unit,
                "amounts": [amount(moved, moved.parts[i]) for moved in explanation.means],
                "share": f"{100 * shares[i]:.1f} %",
            }
        )
    return lines


def _line(moved: Moved, explanation: Explanation) -> dict[str, str]:
    return {
        "name": f"{moved.kind} of {moved.name}",
        "value": value_words(moved),
        "typical": value_words(moved, typical=True),
        "change": amount(moved, moved.change),
        "bound": f"{moved.bound} bound" if moved.bound else "",
        "because": because(moved, explanation.entries, short=True),
    }
