"""What an explanation says in words: the same sentences for the terminal and the page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from fedl2p.explain.explanation import Entry, Explanation, Moved
from fedl2p.reporting.client_views import describe_about
from fedl2p.reporting.number_formats import MINUS, short_number, signed
from fedl2p.runs.text_table import columns

TIMES = "\N{MULTIPLICATION SIGN}"
NOTHING = 0.0001
"""A smaller difference of mixes, or logarithm of a factor, is written as none."""
MOST_NAMED = 2
"""Profile entries that a sentence names in each direction."""
SMALL_PART = 0.5
"""A part below this fraction of the largest is not worth its place in a sentence."""
CANCELLED = 0.1
"""A change below this fraction of all movement came about by pushes that cancel."""
LINES = 8
"""Entries, mixes and rates that the terminal's tables show at most."""
MOST_BOUNDS = 4
"""Hyperparameters at a bound that a sentence names."""
WIDTH = 100


def text(explanation: Explanation) -> str:
    """Return an explanation for a terminal: a paragraph and the tables of what moved most."""
    says = [
        *_wrapped(who(explanation)),
        "",
        *_wrapped(" ".join(sentences(explanation))),
        "",
        *_entry_table(explanation),
        "",
        *_moved_table(explanation),
        "",
        *_wrapped(" ".join([*bound_sentences(explanation), exactness(explanation)])),
    ]
    return "\n".join(says)


def who(explanation: Explanation) -> str:
    """Return the client, and with whom it is compared."""
    known = "; ".join(x for x in (explanation.pool, describe_about(explanation.about)) if x)
    return f"{explanation.client} ({known}) against a typical client: {typical_words(explanation)}"


def typical_words(explanation: Explanation) -> str:
    """Return what the profile of a typical client is."""
    if explanation.compared == 1:
        return "the profile of the run's only seen client"
    return f"the median profile of the run's {explanation.compared} seen clients"


def headline(explanation: Explanation) -> str:
    """Return the result as one sentence."""
    parts = []
    mix, rate = explanation.mean_mix, explanation.mean_rate
    if mix is not None:
        how = _compared(mix, "more of its own statistics than", "less of its own statistics than")
        parts.append(
            f"uses {how or 'as much of its own statistics as'} a typical client "
            f"(mean mix {_against(mix)})"
        )
    how = _compared(rate, "faster than", "slower than")
    whom = "one" if parts else "a typical client"
    parts.append(f"fine-tunes {how or 'as fast as'} {whom} (mean rate {_against(rate)})")
    return f"{explanation.client} {' and '.join(parts)}."


def sentences(explanation: Explanation) -> list[str]:
    """Return the means, the largest single changes and the entries behind them."""
    entries = explanation.entries
    out = [_sentence(moved, entries) for moved in explanation.means]
    for kind in (explanation.mixes, explanation.rates):
        if len(kind) > 1:
            out.append(_sentence(max(kind, key=lambda m: abs(m.change)), entries))
    shares = explanation.shares
    for i in explanation.ranking[:1]:
        if shares[i] > 0:
            out.append(
                f"Over all hyperparameters the {entries[i].name} pushed most: "
                f"{100 * shares[i]:.0f} % of all movement."
            )
    if explanation.mean_mix is None:
        out.append("The model has no batch-norm layer, so there is no mix, only rates.")
    return out


def because(moved: Moved, entries: Sequence[Entry], *, short: bool = False) -> str:
    """Return the entries behind one change: those in its direction, then those against it.

    ``short`` names numbers in brackets and leaves the others out, for tables.
    """
    order = sorted(range(len(entries)), key=lambda i: -abs(moved.parts[i]))
    named = [i for i in order if abs(moved.parts[i]) >= SMALL_PART * abs(moved.parts[order[0]])]
    if not named or not level(moved):
        return "no profile entry moved it"
    toward = [i for i in named if moved.parts[i] * moved.change > 0][:MOST_NAMED]
    against = [i for i in named if moved.parts[i] * moved.change < 0][: MOST_NAMED - 1]
    if abs(moved.change) < CANCELLED * moved.movement:
        words = "pushes cancel: "
        toward, against = toward[:1] + against[:1], []
    else:
        words = "" if short else "mostly because "
    said = [_part(moved, entries[i], i, short) for i in toward]
    words += (", " if short else " and ").join(said)
    if against and not short:
        words += "; against that, " + " and ".join(
            _part(moved, entries[i], i, short) for i in against
        )
    return words


def level(moved: Moved) -> bool:
    """Tell whether anything visible moved a hyperparameter, in whatever direction."""
    return moved.movement > 1e-6 * (1.0 if moved.log or moved.kind == "mix" else abs(moved.typical))


def amount(moved: Moved, part: float) -> str:
    """Return a part of a change, or the change: a difference of mixes, a factor on a rate."""
    if moved.kind == "mix":
        if abs(part) < NOTHING:
            return "0"
        return signed(part, ".2f" if abs(part) >= 0.0995 else ".2g")
    if moved.log:
        return TIMES + _factor(part)
    words = short_number(abs(part), 3)
    return words if part == 0 else f"{MINUS if part < 0 else '+'}{words}"


def value_words(moved: Moved, *, typical: bool = False) -> str:
    """Return a value; what the nets wrote before the bound stands in brackets if that differs."""
    value, written, bound = (
        (moved.typical, moved.typical_written, moved.typical_bound)
        if typical
        else (moved.value, moved.written, moved.bound)
    )
    words, before = _level(moved, value), _level(moved, written)
    return f"{words} ({before})" if bound and before != words else words


def bound_sentences(explanation: Explanation) -> list[str]:
    """Return which hyperparameters a bound holds; nothing if none does."""
    held = [m for m in (*explanation.mixes, *explanation.rates) if m.bound]
    typical = sum(m.typical_bound is not None for m in (*explanation.mixes, *explanation.rates))
    if not held and not typical:
        return []
    out = []
    if held:
        names = [
            f"{m.kind} of {m.name} ({m.bound} bound {_level(m, m.value)}, the nets wrote "
            f"{_level(m, m.written)})"
            for m in held[:MOST_BOUNDS]
        ]
        more = f" and {len(held) - MOST_BOUNDS} more" if len(held) > MOST_BOUNDS else ""
        out.append(f"A bound is active: {', '.join(names)}{more}.")
    if typical:
        out.append(
            f"The typical client is at a bound in {typical} of "
            f"{len(explanation.mixes) + len(explanation.rates)} hyperparameters."
        )
    out.append(
        "Changes and their parts are those before the bounds; values before a bound stand in "
        "brackets."
    )
    return out


def exactness(explanation: Explanation) -> str:
    """Return how exactly the parts add up."""
    gap = f"{100 * explanation.gap:.2g} %"
    if not explanation.converged:
        return (
            f"Not exact: with {explanation.points} points of the path the parts add up only within "
            f"{gap} of all movement, where {100 * explanation.tolerance:g} % was wanted; read them "
            "as a direction."
        )
    return (
        f"The parts of every change add up to it within {gap} of its movement "
        f"({explanation.points} points of the path)."
    )


def _sentence(moved: Moved, entries: Sequence[Entry]) -> str:
    mean = moved.name == "mean"
    name = f"mean {moved.kind}" if mean else f"{moved.kind} of {moved.name}"
    words, reason = f"The {name} is {_level(moved, moved.value)}", because(moved, entries)
    change = amount(moved, moved.change)
    if moved.bound or moved.typical_bound:
        held = f", its {moved.bound} bound" if moved.bound and not mean else ""
        bounds = "bounds" if mean else "bound"
        return (
            f"{words}{held} (typical {_level(moved, moved.typical)}); before the {bounds} it "
            f"changed by {change}: {reason}."
        )
    # A factor needs no direction: above or below 1 says it.
    factor = moved.kind == "rate" and moved.log
    whose = "a typical client's" if factor else "over a typical client"
    return f"{words}, {change} {whose}: {reason}."


def _part(moved: Moved, entry: Entry, position: int, short: bool) -> str:
    value, typical = entry.numbers
    part = amount(moved, moved.parts[position])
    if short:
        return f"{entry.name} {part}"
    return f"the {entry.name} is {value}{entry.unit} (typical {typical}): {part}"


def _compared(moved: Moved, above: str, below: str) -> str:
    """Return which of two words holds of the values; nothing where they print the same."""
    if _level(moved, moved.value) == _level(moved, moved.typical):
        return ""
    return above if moved.value > moved.typical else below


def _against(moved: Moved) -> str:
    return f"{_level(moved, moved.value)} against {_level(moved, moved.typical)}"


def _factor(log: float) -> str:
    """Return a factor with as many decimals as a difference of mixes of this size."""
    if abs(log) < NOTHING:
        return "1"
    if abs(log) < 2.25:
        decimals = 2 if abs(log) >= 0.0995 else 3 if abs(log) >= 0.00095 else 4
        return f"{math.exp(log):.{decimals}f}"
    return short_number(math.exp(min(log, 700.0)))


def _level(moved: Moved, value: float) -> str:
    words = f"{value:.2f}" if moved.kind == "mix" else short_number(value)
    return words.replace("-", MINUS)


def _entry_table(explanation: Explanation) -> list[str]:
    means = explanation.means
    rows = [["profile entry", "client", "typical", *(f"mean {m.kind}" for m in means), "share"]]
    shares = explanation.shares
    for i in explanation.ranking[:LINES]:
        entry = explanation.entries[i]
        value, typical = entry.numbers
        rows.append(
            [
                entry.name,
                value + entry.unit,
                typical,
                *(amount(m, m.parts[i]) for m in means),
                f"{100 * shares[i]:.0f} %",
            ]
        )
    return columns(rows)


def _moved_table(explanation: Explanation) -> list[str]:
    rows = [["hyperparameter", "value", "typical", "change"]]
    reasons = ["mostly because"]
    for kind in (explanation.mixes, explanation.rates):
        for moved in sorted(kind, key=lambda m: -abs(m.change))[:LINES]:
            rows.append(
                [
                    f"{moved.kind} of {moved.name}",
                    value_words(moved),
                    value_words(moved, typical=True),
                    amount(moved, moved.change),
                ]
            )
            reasons.append(because(moved, explanation.entries, short=True))
    lines = columns(rows)
    head, rule, *rest = lines
    return [
        f"{head}   {reasons[0]}",
        f"{rule}{'-' * (3 + len(reasons[0]))}",
        *(f"{line}   {reason}" for line, reason in zip(rest, reasons[1:], strict=True)),
    ]


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)
