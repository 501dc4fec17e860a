"""What an explanation says: its sentences, its tables, its page."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from fedl2p.explain.explanation import Entry, Explanation, Moved, mean_of
from fedl2p.explain.page import render_explanation
from fedl2p.explain.part_bars import part_bars
from fedl2p.explain.sentences import TIMES, amount, because, headline, sentences, text
from fedl2p.reporting.number_formats import MINUS
from support.html import Tags

pytest.importorskip("jinja2")

ENTRIES = (
    Entry(kind="divergence", layer="norm1", value=3.2, typical=0.3),
    Entry(kind="divergence", layer="norm2", value=0.1, typical=0.1004),
    Entry(kind="mean", layer="conv1", value=-0.25, typical=0.5),
    Entry(kind="sd", layer="conv1", value=1.5, typical=1.0),
)


def typed(words: str) -> str:
    """Return words with the signs that a keyboard has."""
    return words.replace(TIMES, "x").replace(MINUS, "-")


def mix(name: str, typical: float, *parts: float) -> Moved:
    before = typical + math.fsum(parts)
    return Moved(
        kind="mix",
        name=name,
        log=False,
        value=min(1.0, max(0.0, before)),
        typical=min(1.0, max(0.0, typical)),
        before=before,
        typical_before=typical,
        parts=parts,
    )


def rate(name: str, typical: float, *parts: float, highest: float = 1.0) -> Moved:
    before = math.log(typical) + math.fsum(parts)
    return Moved(
        kind="rate",
        name=name,
        log=True,
        value=min(highest, math.exp(before)),
        typical=typical,
        before=before,
        typical_before=math.log(typical),
        parts=parts,
    )


def explained(mixes: tuple[Moved, ...], rates: tuple[Moved, ...], **changes: object) -> Explanation:
    mean_rate = mean_of(rates)
    assert mean_rate is not None
    made = Explanation(
        client="hospital-7",
        pool="unseen",
        about={"sensor": "blur", "severity": 0.7},
        recipe="digits",
        seed=3,
        compared=40,
        reads="log(0.001 + divergence) and the moments",
        entries=ENTRIES,
        mixes=mixes,
        rates=rates,
        mean_mix=mean_of(mixes),
        mean_rate=mean_rate,
        points=256,
        gap=0.002,
        tolerance=0.01,
    )
    return dataclasses.replace(made, **changes)


MIXES = (mix("norm1", 0.5, 0.02, 0.0, 0.01, 0.0), mix("norm2", 0.75, 0.10, 0.0, -0.06, 0.12))
RATES = (rate("w", 0.05, math.log(2), 0.0, 0.0, math.log(0.9)), rate("b", 0.05, 0.1, 0, 0, 0))
USUAL = explained(MIXES, RATES)


def test_a_change_is_said_in_its_unit() -> None:
    assert [typed(amount(MIXES[0], x)) for x in (0.155, -0.034, 0.0, -1e-6)] == [
        *("+0.15", "-0.034", "0", "0"),
    ]
    factors = [typed(amount(RATES[0], math.log(x))) for x in (1.8, 0.5, 1.034, 1.0, 40.0)]
    assert factors == ["x1.80", "x0.50", "x1.034", "x1", "x40"]
    linear = dataclasses.replace(RATES[0], log=False)
    assert [typed(amount(linear, x)) for x in (0.003, -2.4e-7, 0.0)] == ["+0.003", "-2.4e-7", "0"]


def test_the_reasons_are_the_largest_parts_in_the_direction_of_the_change() -> None:
    assert typed(because(MIXES[1], ENTRIES)) == (
        "mostly because the input sd of conv1 is 1.5 (typical 1): +0.12 and the divergence of "
        "norm1 is 3.2 nats (typical 0.3): +0.10; against that, the input mean of conv1 is -0.25 "
        "(typical 0.5): -0.06"
    )
    # A tenth of the largest is not named.
    small = mix("n", 0.5, 0.1, 0.01, -0.01, 0.0)
    assert because(small, ENTRIES) == (
        "mostly because the divergence of norm1 is 3.2 nats (typical 0.3): +0.10"
    )
    assert because(small, ENTRIES, short=True) == "divergence of norm1 +0.10"


def test_pushes_that_cancel_are_called_so() -> None:
    cancels = mix("n", 0.5, 0.3, 0.0, -0.29, 0.0)
    words = typed(because(cancels, ENTRIES, short=True))
    assert words == "pushes cancel: divergence of norm1 +0.30, input mean of conv1 -0.29"
    assert because(mix("n", 0.5, 0, 0, 0, 0), ENTRIES) == "no profile entry moved it"


def test_numbers_that_differ_are_written_so_that_they_do() -> None:
    assert ENTRIES[0].numbers == ("3.2", "0.3")
    assert ENTRIES[1].numbers == ("0.1", "0.1004")
    assert Entry(kind="sd", layer="x", value=0.5, typical=0.5).numbers == ("0.5", "0.5")


def test_the_terminal_says_who_what_and_why() -> None:
    said = text(USUAL)
    lines = said.splitlines()
    assert lines[0].startswith("hospital-7 (unseen; sensor blur, severity 0.7) against a typical")
    flat = " ".join(said.split())
    assert "a typical client: the median profile of the run's 40 seen clients" in flat
    assert "The mix of norm2 is 0.91, +0.16 over a typical client: mostly because" in flat
    assert "The mean mix is 0.72, +0.095 over a typical client" in flat
    assert "The rate of w is 0.09, x1.80 a typical client's" in typed(flat)
    assert re.search(r"^  divergence of norm1 +3\.2 nats +0\.3 ", said, re.M)
    assert re.search(r"^  mix of norm2 +0\.91 +0\.75 +\+0\.16   input sd of conv1", said, re.M)
    assert "within 0.2 % of its movement (256 points" in flat
    assert "bound" not in said
    assert all(len(line) <= 100 for line in lines if not line.startswith("  "))


def test_shares_count_pushes_in_both_directions_and_weigh_mixes_and_rates_alike() -> None:
    mixes = (mix("a", 0.5, 0.1, 0, -0.1, 0), mix("b", 0.5, -0.1, 0, -0.1, 0))
    shares = explained(mixes, (rate("w", 0.05, 0, 0, 0, -3.0),)).shares
    assert shares == pytest.approx((0.25, 0.0, 0.25, 0.5))
    still = explained((mix("a", 0.5, 0, 0, 0, 0),), (rate("w", 0.05, 0, 0, 0, 0),))
    assert still.shares == (0, 0, 0, 0)
    assert "no profile entry moved it" in text(still)
    assert "<svg" in render_explanation(still)


BOUNDED = explained(
    (mix("norm1", 1.1, 0.2, 0, 0, 0), mix("norm2", 0.2, -0.5, 0, 0, 0)),
    (rate("w", 0.5, math.log(4), 0, 0, 0), rate("b", 0.05, 0.1, 0, 0, 0)),
)


def test_active_bounds_are_named_and_values_before_them_kept() -> None:
    assert [m.bound for m in (*BOUNDED.mixes, *BOUNDED.rates)] == ["upper", "lower", "upper", None]
    said = typed(" ".join(text(BOUNDED).split()))
    assert (
        "A bound is active: mix of norm1 (upper bound 1.00, the nets wrote 1.30), mix of norm2 "
        "(lower bound 0.00, the nets wrote -0.30), rate of w (upper bound 1, the nets wrote 2)."
    ) in said
    assert "The typical client is at a bound in 1 of 4 hyperparameters." in said
    assert "those before the bounds" in said
    assert "The mix of norm2 is 0.00, its lower bound (typical 0.20); before the bound it" in said
    assert re.search(r"mix of norm1 +1\.00 \(1\.30\) +1\.00 \(1\.10\)", text(BOUNDED))
    # The headline is about what the client gets: 0.5 and 0.6 on average.
    assert "uses less of its own statistics than a typical client (mean mix 0.50 against 0.60)" in (
        headline(BOUNDED)
    )
    assert BOUNDED.as_json()["mix"]["norm1"]["bound"] == "upper"
    assert BOUNDED.as_json()["mix"]["norm1"]["before_bounds"] == pytest.approx(1.3)


def test_parts_that_do_not_add_up_are_not_called_exact() -> None:
    said = " ".join(text(dataclasses.replace(USUAL, gap=0.034, points=4096)).split())
    assert "Not exact: with 4096 points" in said
    assert "only within 3.4 %" in said
    assert dataclasses.replace(USUAL, gap=0.034).as_json()["converged"] is False


def test_without_norms_there_are_rates_only() -> None:
    only = explained((), RATES, entries=ENTRIES[2:])
    only = dataclasses.replace(
        only,
        rates=(rate("w", 0.05, 0.5, 0.1),),
        mean_rate=mean_of((rate("w", 0.05, 0.5, 0.1),)),
    )
    said = text(only)
    assert "no batch-norm layer" in said
    assert "mix of" not in said
    assert headline(only) == (
        "hospital-7 fine-tunes faster than a typical client (mean rate 0.091 against 0.05)."
    )
    assert "Mean mix" not in render_explanation(only)


def test_the_mean_rate_is_geometric_and_its_parts_add_up() -> None:
    mean = USUAL.mean_rate
    assert mean.value == pytest.approx(math.sqrt(RATES[0].value * RATES[1].value))
    assert math.fsum(mean.parts) == pytest.approx(mean.change)
    assert mean_of(()) is None


def test_the_numbers_survive_json() -> None:
    plain = json.loads(json.dumps(USUAL.as_json(), allow_nan=False))
    one = plain["mix"]["norm2"]
    assert math.fsum(one["parts"].values()) == pytest.approx(one["change"])
    assert set(one["parts"]) == {entry.name for entry in ENTRIES} == set(plain["profile"])
    huge = dataclasses.replace(USUAL, rates=(dataclasses.replace(RATES[0], before=900.0),))
    plain = json.loads(json.dumps(huge.as_json(), allow_nan=False))
    assert plain["rate"]["w"]["before_bounds"] is None


# ------------------------------------------------------------ the page


def test_the_page_stands_alone_and_says_the_same() -> None:
    page = render_explanation(USUAL)
    tags = Tags(page)
    for sentence in (headline(USUAL), *sentences(USUAL)):
        assert sentence in tags.text
    for _, name, value in tags.attributes:
        assert name not in ("src", "onload", "onclick")
        assert name != "href" or value.startswith("data:")
    assert "://" not in page
    assert "@import" not in page
    for entry in ENTRIES:
        assert entry.name in tags.text
    for moved in (*MIXES, *RATES):
        assert f"{moved.kind} of {moved.name}" in tags.text


def test_every_picture_has_a_title_and_a_description() -> None:
    page = render_explanation(USUAL)
    drawings = re.findall(r'<svg width="100%"[^>]*>(.{0,600})', page)
    assert len(drawings) == 4  # two charts of bars and two maps
    for start in drawings:
        assert re.match(r"<title>[^<]{10,}</title><desc>[^<]{10,}</desc>", start)
    assert len(re.findall(r'role="img" aria-label="[^"]{10,}"', page)) == 4
    assert "The strongest: divergence of norm1 on the rate of w, x2.00." in typed(page)


def test_bars_start_at_zero_and_have_the_lengths_of_their_parts() -> None:
    moved = mix("mean", 0.5, 0.2, 0.0, -0.1, 0.05)
    drawn = part_bars(moved, ENTRIES, label="a label", description="a description")
    bars = re.findall(
        r'<rect x="([\d.]+)%" width="([\d.]+)%"[^>]* class="(\w+)"><title>([^:]+)', drawn
    )
    ends = {name: (float(x), float(width), kind) for x, width, kind, name in bars}
    zero = ends["divergence of norm1"][0]
    scale = ends["divergence of norm1"][1] / 0.2
    assert ends["divergence of norm1"][2] == "up"
    x, width, kind = ends["input mean of conv1"]
    assert kind == "down"
    assert x + width == pytest.approx(zero, abs=0.02)
    assert width == pytest.approx(0.1 * scale, abs=0.02)
    assert ends["all entries"][1] == pytest.approx(0.15 * scale, abs=0.02)


def test_a_deep_model_still_makes_a_page_of_a_reasonable_size() -> None:
    deep = tuple(
        Entry(kind="mean", layer=f"layer{i}.<b>&downsample.conv", value=i, typical=0.5)
        for i in range(260)
    )
    parts = [[0.001 * ((i * j) % 7 - 3) for i in range(260)] for j in range(160)]
    big = explained(
        tuple(mix(f"layer{j}.bn", 0.5, *parts[j]) for j in range(53)),
        tuple(rate(f"layer{j}.weight", 0.05, *parts[j]) for j in range(160)),
        entries=deep,
        client="<i>me</i>",
    )
    page = render_explanation(big)
    assert len(page) < 1_500_000
    shown = Tags(page).text
    assert "200 other entries" in shown  # of the map
    assert "251 other entries" in shown  # of the bars
    assert "<b>" not in page
    assert "<i>me" not in page
    assert len(text(big).splitlines()) < 60


def test_long_names_keep_both_ends_of_the_layer() -> None:
    entry = Entry(kind="divergence", layer="layer2.0.downsample.1", value=1, typical=2)
    assert entry.short(26) == "div. layer2.0.downsample.1"
    assert len(entry.short(20)) == 20
    assert re.fullmatch(r"div\. layer2.+ample\.1", entry.short(20))
    assert ENTRIES[0].short(26) == "divergence of norm1"
