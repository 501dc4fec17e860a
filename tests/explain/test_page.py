"""What an explanation says: its sentences, its table, its figure, its page."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from fedl2p.explain.attribution import Attribution, Entry, Explained
from fedl2p.explain.explanation import Explanation, mean_of
from fedl2p.explain.page import render_explanation
from fedl2p.explain.sentences import (
    TIMES,
    amount,
    because,
    entry_numbers,
    headline,
    row,
    sentences,
    text,
)
from fedl2p.reporting.number_formats import MINUS
from support.html import Tags

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

ENTRIES = (
    Entry("divergence of norm1", 3.2, 0.3, " nats"),
    Entry("divergence of norm2", 0.1, 0.1004, " nats"),
    Entry("input mean of conv1", -0.25, 0.5),
    Entry("input sd of conv1", 1.5, 1.0),
)


def typed(words: str) -> str:
    """Return words with the signs that a keyboard has."""
    return " ".join(words.replace(TIMES, "x").replace(MINUS, "-").split())


def mix(name: str, typical: float, *parts: float) -> Explained:
    output = typical + math.fsum(parts)
    return Explained(
        kind="mix",
        name=name,
        log=False,
        value=min(1.0, max(0.0, output)),
        typical=min(1.0, max(0.0, typical)),
        output=output,
        typical_output=typical,
        attributions=parts,
    )


def rate(name: str, typical: float, *parts: float, highest: float = 1.0) -> Explained:
    output = math.log(typical) + math.fsum(parts)
    return Explained(
        kind="rate",
        name=name,
        log=True,
        value=min(highest, math.exp(output)),
        typical=typical,
        output=output,
        typical_output=math.log(typical),
        attributions=parts,
    )


def explained(
    mixes: tuple[Explained, ...],
    rates: tuple[Explained, ...],
    *,
    entries: tuple[Entry, ...] = ENTRIES,
    gap: float = 0.002,
    client: str = "hospital-7",
) -> Explanation:
    return Explanation(
        client=client,
        pool="unseen",
        about={"sensor": "blur", "severity": 0.7},
        recipe="digits",
        seed=3,
        num_typical=40,
        attribution=Attribution(entries=entries, mixes=mixes, rates=rates, gap=gap),
    )


MIXES = (mix("norm1", 0.5, 0.02, 0.0, 0.01, 0.0), mix("norm2", 0.75, 0.10, 0.0, -0.06, 0.12))
RATES = (rate("w", 0.05, math.log(2), 0.0, 0.0, math.log(0.9)), rate("b", 0.05, 0.1, 0, 0, 0))
USUAL = explained(MIXES, RATES)
FOUND = USUAL.attribution


def test_a_change_is_said_in_its_unit() -> None:
    assert [typed(amount(MIXES[0], x)) for x in (0.155, -0.034, 0.0, -1e-6)] == [
        *("+0.15", "-0.034", "0", "0"),
    ]
    factors = [typed(amount(RATES[0], math.log(x))) for x in (1.8, 0.5, 1.034, 1.0, 40.0)]
    assert factors == ["x1.80", "x0.50", "x1.034", "x1", "x40"]
    linear = dataclasses.replace(RATES[0], log=False)
    assert [typed(amount(linear, x)) for x in (0.003, -2.4e-7, 0.0)] == ["+0.003", "-2.4e-07", "0"]


def test_the_reasons_are_the_largest_attributions_with_their_signs() -> None:
    assert typed(because(MIXES[1], FOUND, numbers=True)) == (
        "input sd of conv1 (1.5, typical 1) +0.12, divergence of norm1 (3.2 nats, typical 0.3) "
        "+0.10"
    )
    # What pushed the other way is named where it pushed most.
    opposed = mix("n", 0.5, 0.3, 0.0, -0.2, -0.2)
    assert typed(because(opposed, FOUND)) == (
        "input mean of conv1 -0.20, input sd of conv1 -0.20, against divergence of norm1 +0.30"
    )
    assert typed(because(mix("n", 0.5, 0.3, 0.0, -0.2, 0.0), FOUND)) == "divergence of norm1 +0.30"
    # A tenth of the largest is not named.
    assert because(mix("n", 0.5, 0.1, 0.01, -0.01, 0.0), FOUND) == "divergence of norm1 +0.10"


def test_where_nothing_moved_no_entry_is_named() -> None:
    assert because(mix("n", 0.5, 0, 0, 0, 0), FOUND) == "no profile entry"


def test_numbers_that_differ_are_written_so_that_they_do() -> None:
    assert entry_numbers(ENTRIES[0]) == "3.2 nats, typical 0.3"
    assert entry_numbers(ENTRIES[1]) == "0.1 nats, typical 0.1004"
    assert entry_numbers(Entry("x", 0.5, 0.5)) == "0.5, typical 0.5"


def test_the_terminal_says_who_what_and_why() -> None:
    said = text(USUAL)
    lines = said.splitlines()
    assert lines[0].startswith("hospital-7 (unseen; sensor blur, severity 0.7), compared with the")
    flat = typed(said)
    assert "the median profile of the run's seen clients (40)" in flat
    assert "The mix of norm2 is 0.91 against 0.75, a change of +0.16, mostly because of" in flat
    assert "The mean mix is 0.72 against 0.62, a change of +0.095" in flat
    assert "The rate of w is 0.09 against 0.05, a change of x1.80, mostly because of" in flat
    assert re.search(r"^  mix of norm2 +0\.91 +0\.75 +\+0\.16   input sd of conv1", said, re.M)
    assert "within 0.2 % of all movement" in flat
    assert "bound" not in said
    assert all(len(line) <= 100 for line in lines if not line.startswith("  "))


def test_shares_count_pushes_in_both_directions_and_weigh_mixes_and_rates_alike() -> None:
    mixes = (mix("a", 0.5, 0.1, 0, -0.1, 0), mix("b", 0.5, -0.1, 0, -0.1, 0))
    shares = explained(mixes, (rate("w", 0.05, 0, 0, 0, -3.0),)).shares
    assert shares == pytest.approx((0.25, 0.0, 0.25, 0.5))
    still = explained((mix("a", 0.5, 0, 0, 0, 0),), (rate("w", 0.05, 0, 0, 0, 0),))
    assert still.shares == [0, 0, 0, 0]
    assert "because of no profile entry" in text(still)
    assert "<svg" in render_explanation(still)


BOUNDED = explained(
    (mix("norm1", 1.1, 0.2, 0, 0, 0), mix("norm2", 0.2, -0.5, 0, 0, 0)),
    (rate("w", 0.5, math.log(4), 0, 0, 0), rate("b", 0.05, 0.1, 0, 0, 0)),
)


def test_values_at_a_bound_have_their_output_in_brackets() -> None:
    mixes, rates = BOUNDED.kinds
    assert [one.at_bound for one in (*mixes, *rates)] == [True, True, True, False]
    assert "3 of 4 hyperparameters are at a bound" in typed(text(BOUNDED))
    assert row(mixes[0], FOUND)[1:3] == ("1.00 (1.30)", "1.00 (1.10)")
    # The headline is about what the client gets: 0.5 and 0.6 on average.
    assert headline(BOUNDED) == (
        "Next to a typical client, hospital-7 mixes in less of its own statistics (mean mix 0.50 "
        "against 0.60) and fine-tunes faster (mean rate 0.24 against 0.16)."
    )
    plain = BOUNDED.to_dict()["mix"]["norm1"]
    assert (plain["value"], plain["before_bounds"]) == (1.0, pytest.approx(1.3))


def test_attributions_that_do_not_add_up_are_not_called_exact() -> None:
    said = typed(text(explained(MIXES, RATES, gap=0.034)))
    assert "Not exact: attributions miss the changes by up to 3.4 %" in said


def test_without_norms_there_are_rates_only() -> None:
    only = explained((), (rate("w", 0.05, 0.5, 0.1),), entries=ENTRIES[2:])
    said = typed(text(only))
    assert "no batch-norm layer" in said
    assert "mix of" not in said
    assert headline(only) == (
        "Next to a typical client, hospital-7 fine-tunes faster (mean rate 0.091 against 0.05)."
    )
    assert "Mean mix" not in render_explanation(only)


def test_the_mean_rate_is_geometric_and_its_attributions_add_up() -> None:
    mean = mean_of(RATES)
    assert mean.value == pytest.approx(math.sqrt(RATES[0].value * RATES[1].value))
    assert math.fsum(mean.attributions) == pytest.approx(mean.change)


def test_the_numbers_survive_json() -> None:
    plain = json.loads(json.dumps(USUAL.to_dict(), allow_nan=False))
    one = plain["mix"]["norm2"]
    assert math.fsum(one["attributions"].values()) == pytest.approx(one["change"])
    assert set(one["attributions"]) == {entry.name for entry in ENTRIES} == set(plain["profile"])
    huge = explained(MIXES, (dataclasses.replace(RATES[0], output=900.0),))
    plain = json.loads(json.dumps(huge.to_dict(), allow_nan=False))
    assert plain["rate"]["w"]["before_bounds"] is None


# ------------------------------------------------------------ the page


def test_the_page_stands_alone_and_says_the_same() -> None:
    page = render_explanation(USUAL)
    tags = Tags(page)
    for sentence in (headline(USUAL), *sentences(USUAL)):
        assert sentence in tags.text
    for _, name, value in tags.attributes:
        assert name not in ("src", "onload", "onclick")
        assert name != "href" or value.startswith(("data:image/png", "#"))
    assert "://" not in page
    assert "@import" not in page
    for entry in ENTRIES:
        assert f"{entry.name}: {entry_numbers(entry)}" in tags.text
    for cells in (row(one, FOUND) for one in (*MIXES, *RATES)):
        assert all(cell in tags.text for cell in cells)


def test_the_figure_says_its_shares_and_its_scale() -> None:
    page = typed(render_explanation(USUAL))
    found = re.search(
        r'<svg [^>]*role="img" aria-label="[^"]{10,}"[^>]*><desc>([^<]*)</desc>', page
    )
    assert found
    for share, entry in zip(USUAL.shares, ENTRIES, strict=True):
        assert f"{entry.name}: {typed(entry_numbers(entry))} {100 * share:.0f} %" in found[1]
    # The colour bars end at the largest attribution.
    for end in ("-0.12", "+0.12", "x0.50", "x2.00"):
        assert f">{end}</text>" in page


def test_a_deep_model_still_makes_a_page_of_a_reasonable_size() -> None:
    deep = tuple(Entry(f"input mean of layer{i}.<b>&downsample.$conv$", i, 0.5) for i in range(260))
    parts = [[0.001 * ((i * j) % 7 - 3) for i in range(260)] for j in range(160)]
    big = explained(
        tuple(mix(f"layer{j}.bn", 0.5, *parts[j]) for j in range(53)),
        tuple(rate(f"layer{j}.weight", 0.05, *parts[j]) for j in range(160)),
        entries=deep,
        client="<i>me</i>",
    )
    page = render_explanation(big)
    assert len(page) < 300_000
    assert "220 other entries" in Tags(page).text
    assert "<b>" not in page
    assert "<i>me" not in page
    assert len(text(big).splitlines()) < 60
