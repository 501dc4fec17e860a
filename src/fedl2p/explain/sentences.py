"""What an explanation says in words: the same in the terminal and on the page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from fedl2p.explain.explanation import Entry, Explained, Explanation
from fedl2p.reporting.client_views import describe_about
from fedl2p.reporting.number_formats import MINUS, short_number, signed
from fedl2p.runs.text_table import columns

TIMES = "\N{MULTIPLICATION SIGN}"
NOTHING = 0.0001
"""A smaller difference of mixes, or logarithm of a factor, is written as none."""
MOST_REASONS = 2
SMALL_REASON = 0.5
"""An attribution below this fraction of the largest is not named."""
CANCELLED = 0.1
"""A change below this fraction of all movement came about by pushes that cancel."""
WANTED_GAP = 0.01
"""Attributions that miss their sum by more, as a fraction of all movement, are called inexact."""
MOST_ROWS = 8
"""Mixes, and rates, that the terminal's table shows."""

HEADS = ("hyperparameter", "client", "typical", "change", "mostly because of")


def text(explanation: Explanation) -> str:
    """Return an explanation for a terminal: sentences, and a table of what changed most."""
    kinds = (explanation.mixes, explanation.rates)
    shown = [sorted(kind, key=lambda one: -abs(one.change))[:MOST_ROWS] for kind in kinds]
    rows = [row(one, explanation.entries) for kind in shown for one in kind]
    # The last column is the only one of words.
    head, rule, *lines = columns([HEADS[:-1], *(cells[:-1] for cells in rows)])
    paragraph = " ".join(sentences(explanation))
    return "\n".join(
        [
            *_wrapped(f"{known(explanation)}, compared with {typical_client(explanation)}"),
            "",
            *_wrapped(paragraph),
            "",
            f"{head}   {HEADS[-1]}",
            f"{rule}{'-' * (3 + len(HEADS[-1]))}",
            *(f"{line}   {cells[-1]}" for line, cells in zip(lines, rows, strict=True)),
            "",
            *_wrapped(exactness(explanation)),
        ]
    )


def known(explanation: Explanation) -> str:
    """Return who the client is."""
    words = "; ".join(x for x in (explanation.pool, describe_about(explanation.about)) if x)
    return f"{explanation.client} ({words})"


def typical_client(explanation: Explanation) -> str:
    """Return whose profile is typical."""
    if explanation.num_typical == 1:
        return "the run's only seen client"
    return f"the median profile of the run's {explanation.num_typical} seen clients"


def headline(explanation: Explanation) -> str:
    """Return the result as one sentence."""
    said = []
    for mean in explanation.means:
        more, less, same = (
            ("mixes in more", "mixes in less", "mixes in as much")
            if mean.kind == "mix"
            else ("fine-tunes faster", "fine-tunes slower", "fine-tunes as fast")
        )
        value, typical = _number(mean, mean.value), _number(mean, mean.typical)
        verb = same if value == typical else more if mean.value > mean.typical else less
        link = "as" if verb == same else "than"
        what = " of its own statistics" if mean.kind == "mix" else ""
        said.append(
            f"{verb}{what} {link} a typical client (mean {mean.kind} {value} against {typical})"
        )
    return f"{explanation.client} {' and '.join(said)}."


def sentences(explanation: Explanation) -> list[str]:
    """Return why the means and the hyperparameters that changed most are what they are."""
    chosen = list(explanation.means)
    for kind in (explanation.mixes, explanation.rates):
        if len(kind) > 1:
            chosen.append(max(kind, key=lambda one: abs(one.change)))
    out = []
    for one in chosen:
        name = f"mean {one.kind}" if one.name == "mean" else f"{one.kind} of {one.name}"
        reasons = because(one, explanation.entries, numbers=True)
        out.append(
            f"The {name} is {value_words(one)} against {value_words(one, typical=True)}, "
            f"a change of {amount(one, one.change)}, mostly because of {reasons}."
        )
    share = explanation.shares
    if explanation.ranking and share[i := explanation.ranking[0]] > 0:
        out.append(f"The {explanation.entries[i].name} has {100 * share[i]:.0f} % of all movement.")
    if not explanation.mixes:
        out.append("The model has no batch-norm layer, so there is no mix, only rates.")
    every = (*explanation.mixes, *explanation.rates)
    if bound := sum(one.bound is not None for one in every):
        out.append(
            f"{bound} of {len(every)} hyperparameters are at a bound; their outputs before it "
            "stand in brackets, and changes are changes of outputs."
        )
    return out


def because(explained: Explained, entries: Sequence[Entry], *, numbers: bool = False) -> str:
    """Return the largest attributions; with ``numbers`` the values of their entries too."""
    parts = explained.attributions
    order = sorted(range(len(entries)), key=lambda i: -abs(parts[i]))
    named = [i for i in order if abs(parts[i]) >= SMALL_REASON * abs(parts[order[0]])]
    small = 1e-6 if explained.log or explained.kind == "mix" else 1e-6 * abs(explained.typical)
    if not named or explained.movement <= small:
        return "no profile entry"
    said = []
    for i in named[:MOST_REASONS]:
        value = f" ({entries[i].numbers})" if numbers else ""
        said.append(f"{entries[i].name}{value} {amount(explained, parts[i])}")
    cancel = abs(explained.change) < CANCELLED * explained.movement
    return ("pushes that cancel, " if cancel else "") + ", ".join(said)


def row(explained: Explained, entries: Sequence[Entry]) -> tuple[str, ...]:
    """Return the cells of a hyperparameter under :data:`HEADS`."""
    return (
        f"{explained.kind} of {explained.name}",
        value_words(explained),
        value_words(explained, typical=True),
        amount(explained, explained.change),
        because(explained, entries),
    )


def amount(explained: Explained, part: float) -> str:
    """Return a change, or a part of one: a difference of mixes, a factor on a rate."""
    if explained.log:
        return TIMES + _factor(part)
    if explained.kind == "rate":
        return signed(part, ".3g")
    if abs(part) < NOTHING:
        return "0"
    return signed(part, ".2f" if abs(part) >= 0.0995 else ".2g")


def value_words(explained: Explained, *, typical: bool = False) -> str:
    """Return a value; the output before the bound stands in brackets if that differs."""
    value, output = (
        (explained.typical, explained.typical_output)
        if typical
        else (explained.value, explained.output)
    )
    words = _number(explained, value)
    before = _number(explained, explained.unbounded(output))
    return words if before == words else f"{words} ({before})"


def exactness(explanation: Explanation) -> str:
    """Return how exactly the attributions add up."""
    gap = f"{100 * explanation.gap:.2g} % of all movement"
    if explanation.gap > WANTED_GAP:
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


def _number(explained: Explained, value: float) -> str:
    words = f"{value:.2f}" if explained.kind == "mix" else short_number(value)
    return words.replace("-", MINUS)


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, 100, break_long_words=False, break_on_hyphens=False)
