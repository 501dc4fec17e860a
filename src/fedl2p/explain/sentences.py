"""What an explanation says in words: the same in the terminal and on the page."""

from __future__ import annotations

import math
import textwrap

from fedl2p.explain.attribution import Attribution, Entry, Explained
from fedl2p.explain.explanation import Explanation
from fedl2p.reporting.client_views import describe_about
from fedl2p.reporting.number_formats import MINUS, short_number, signed
from fedl2p.text_table import columns

TIMES = "\N{MULTIPLICATION SIGN}"
NOTHING = 0.0001
"""A smaller difference of mixes, or logarithm of a factor, is written as none."""
MOST_REASONS = 2
SMALL_REASON = 0.5
"""An attribution below this fraction of the largest is not named."""
WANTED_GAP = 0.01
"""Attributions that miss their sum by more, as a fraction of all movement, are called inexact."""
MOST_ROWS = 8
"""Mixes, and rates, that the terminal's table shows."""

HEADS = ("hyperparameter", "client", "typical", "change", "mostly because of")

_VERBS = {
    "mix": [f"mixes in {how} of its own statistics" for how in ("as much", "more", "less")],
    "rate": [f"fine-tunes {how}" for how in ("as fast", "faster", "slower")],
}


def text(explanation: Explanation) -> str:
    """Return an explanation for a terminal: sentences, and a table of what changed most."""
    found = explanation.attribution
    rows: list[tuple[str, ...]] = [HEADS]
    for kind in explanation.kinds:
        most = sorted(kind, key=lambda one: -abs(one.change))[:MOST_ROWS]
        rows += [row(one, found) for one in most]
    widest = max(len(cells[-1]) for cells in rows)
    table = columns([(*cells[:-1], cells[-1].ljust(widest)) for cells in rows])
    who = f"{known(explanation)}, compared with {typical_client(explanation)}"
    paragraphs = [who, " ".join(sentences(explanation)), exactness(explanation)]
    first, second, last = ("\n".join(textwrap.wrap(words, 100)) for words in paragraphs)
    return "\n\n".join([first, second, "\n".join(table), last])


def known(explanation: Explanation) -> str:
    """Return who the client is."""
    words = "; ".join(x for x in (explanation.pool, describe_about(explanation.about)) if x)
    return f"{explanation.client} ({words})"


def typical_client(explanation: Explanation) -> str:
    """Return whose profile is typical."""
    return f"the median profile of the run's seen clients ({explanation.num_typical})"


def headline(explanation: Explanation) -> str:
    """Return the result as one sentence."""
    said = []
    for mean in explanation.means:
        value, typical = number(mean, mean.value), number(mean, mean.typical)
        verb = _VERBS[mean.kind][0 if value == typical else 1 if mean.value > mean.typical else 2]
        said.append(f"{verb} (mean {mean.kind} {value} against {typical})")
    return f"Next to a typical client, {explanation.client} {' and '.join(said)}."


def sentences(explanation: Explanation) -> list[str]:
    """Return why the means and the hyperparameters that changed most are what they are."""
    found = explanation.attribution
    most = [max(kind, key=lambda one: abs(one.change)) for kind in explanation.kinds]
    out = []
    for one in (*explanation.means, *most):
        name = f"mean {one.kind}" if one.name == "mean" else f"{one.kind} of {one.name}"
        value, typical = value_words(one), value_words(one, typical=True)
        out.append(
            f"The {name} is {value} against {typical}, a change of {amount(one, one.change)}, "
            f"mostly because of {because(one, found, numbers=True)}."
        )
    if not found.mixes:
        out.append("The model has no batch-norm layer, so there is no mix, only rates.")
    every = (*found.mixes, *found.rates)
    if count := sum(one.at_bound for one in every):
        out.append(
            f"{count} of {len(every)} hyperparameters are at a bound; the nets' outputs stand in "
            "brackets, and changes are changes of outputs."
        )
    return out


def because(one: Explained, attribution: Attribution, *, numbers: bool = False) -> str:
    """Return the largest attributions in the direction of the change, and a larger one against it.

    With ``numbers`` the values of their entries are said too.
    """
    parts = one.attributions
    small = 1e-6 if one.log or one.kind == "mix" else 1e-6 * abs(one.typical)
    if one.movement <= small:
        return "no profile entry"

    def said(i: int) -> str:
        entry = attribution.entries[i]
        value = f" ({entry_numbers(entry)})" if numbers else ""
        return f"{entry.name}{value} {amount(one, parts[i])}"

    order = sorted(range(len(parts)), key=lambda i: -abs(parts[i]))
    toward = [i for i in order if parts[i] * one.change > 0] or order
    named = [i for i in toward if abs(parts[i]) >= SMALL_REASON * abs(parts[toward[0]])]
    words = ", ".join(map(said, named[:MOST_REASONS]))
    return words if toward[0] == order[0] else f"{words}, against {said(order[0])}"


def row(one: Explained, attribution: Attribution) -> tuple[str, ...]:
    """Return the cells of a hyperparameter under :data:`HEADS`."""
    return (
        f"{one.kind} of {one.name}",
        value_words(one),
        value_words(one, typical=True),
        amount(one, one.change),
        because(one, attribution),
    )


def amount(one: Explained, part: float) -> str:
    """Return a change, or a part of one: a difference of mixes, a factor on a rate."""
    if one.log:
        return TIMES + _factor(part)
    if one.kind == "rate":
        return signed(part, ".3g")
    if abs(part) < NOTHING:
        return "0"
    return signed(part, ".2f" if abs(part) >= 0.0995 else ".2g")


def value_words(one: Explained, *, typical: bool = False) -> str:
    """Return a value; the output before the bound stands in brackets if that differs."""
    value, output = (one.typical, one.typical_output) if typical else (one.value, one.output)
    words, before = number(one, value), number(one, one.unbounded(output))
    return words if before == words else f"{words} ({before})"


def entry_numbers(entry: Entry) -> str:
    """Return the client's and the typical number, with as many digits as tell them apart."""
    for digits in (2, 3, 4, 5):
        value, typical = short_number(entry.value, digits), short_number(entry.typical, digits)
        if value != typical or entry.value == entry.typical:
            break
    return f"{value}{entry.unit}, typical {typical}".replace("-", MINUS)


def number(one: Explained, value: float) -> str:
    """Return a mix or a rate with the digits that matter."""
    words = f"{value:.2f}" if one.kind == "mix" else short_number(value)
    return words.replace("-", MINUS)


def exactness(explanation: Explanation) -> str:
    """Return how exactly the attributions add up."""
    gap = f"{100 * explanation.attribution.gap:.2g} % of all movement"
    if explanation.attribution.gap > WANTED_GAP:
        return f"Not exact: attributions miss the changes by up to {gap}; read a direction only."
    return f"Attributions add up to the changes within {gap}."


def _factor(log: float) -> str:
    """Return a factor with as many decimals as a difference of mixes of this size."""
    if abs(log) < NOTHING:
        return "1"
    if abs(log) < 2.25:
        decimals = 2 if abs(log) >= 0.0995 else 3 if abs(log) >= 0.00095 else 4
        return f"{math.exp(log):.{decimals}f}"
    return short_number(math.exp(min(log, 700.0)))
