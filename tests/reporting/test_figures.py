"""The figures: their numbers, that they fit into any page, and what they leave alone."""

from __future__ import annotations

import importlib.resources
import math
import random
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedl2p.reporting.client_views import Group, client_views, group_views
from fedl2p.reporting.figures import gain_strips, learning_curve, strategy_maps
from fedl2p.reporting.heat_maps import TEALS, HeatMap, Rows, log_norm
from fedl2p.reporting.svg import (
    COLOURS,
    add_axes,
    house_style,
    inline_svg,
    new_figure,
    shorten,
    text_width,
    write,
)
from fedl2p.runs.reading import read_run
from support.synthetic_run import make_run

matplotlib = pytest.importorskip("matplotlib")


def groups_of(folder: Path, **options: object) -> tuple[Group, ...]:
    make_run(folder, **options)
    return group_views(client_views(read_run(folder), "fedl2p", baseline=None))


def element(figure: str | None) -> ElementTree.Element:
    """Return a figure as a tree; this fails unless it is well-formed."""
    assert figure is not None
    return ElementTree.fromstring(figure)


def circles(figure: str | None) -> list[tuple[float, float]]:
    """Return where markers stand."""
    return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in element(figure).iter("use")]


def drawn(words: str, name: str = "a") -> str:
    with house_style():
        figure = new_figure(100, 50)
        axes = add_axes(figure, 10, 10, 80, 30)
        axes.axis("off")
        write(axes, 0, 0, words)
        return inline_svg(figure, name=name, label="label", description=words)


# ------------------------------------------------------------ inline SVG


def test_the_settings_of_the_program_stay_and_do_not_count() -> None:
    curve = {"name": "a", "label": "b", "percent": False, "best": 1}
    plain = learning_curve([0, 1, 2], [2.0, 1.0, 1.5], **curve)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        assert learning_curve([0, 1, 2], [2.0, 1.0, 1.5], **curve) == plain
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert learning_curve([0, 1], [2.0, 1.0], name="a", label="b", percent=False, best=None)


def test_figures_of_one_page_share_no_id() -> None:
    one, other = (
        learning_curve([0, 1], [2.0, 1.0], name=name, label="x", percent=False, best=0)
        for name in ("a", "b")
    )
    ids = [re.findall(r' id="([^"]*)"', figure or "") for figure in (one, other)]
    assert ids[0]
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1])
    for figure, own in zip((one, other), ids, strict=True):
        used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', figure or "")
        assert {a or b for a, b in used} <= set(own)


def test_a_figure_brings_no_style_no_metadata_and_no_font() -> None:
    figure = drawn("words")
    tags = {child.tag for child in element(figure).iter()}
    assert not tags & {"style", "metadata", "script"}
    assert not re.search(r"https?:|xmlns|font-family|DejaVu", figure)


def test_colours_are_variables_of_the_page() -> None:
    css = (importlib.resources.files("fedl2p.reporting") / "templates/report.css").read_text()
    for name, colour in COLOURS.items():
        assert f"--{name}: {colour};" in css
        assert css.count(f"--{name}: #") == 2  # in the light and in the dark
    assert "fill: var(--ink)" in drawn("words")
    assert not any(colour in drawn("words") for colour in COLOURS.values())


@pytest.mark.parametrize(
    "words", ["</text><script>alert(1)</script>", "$x^2$", "a&b \"'", "\x00\x0b", "\u5ba2\u6237"]
)
def test_any_name_is_text(words: str, recwarn: pytest.WarningsRecorder) -> None:
    figure = drawn(shorten(words, 60))
    (text,) = [child.text for child in element(figure).iter("text")]
    assert (text or "").strip() == shorten(words, 60).strip()
    assert not recwarn.list


def test_lengths_are_pixels_from_the_upper_left_corner() -> None:
    with house_style():
        figure = new_figure(200, 100)
        axes = add_axes(figure, 20, 10, 100, 50)
        axes.set(xticks=[], yticks=[], ylim=(0, 1))
        axes.axhspan(0, 1, color="red", linewidth=0)
        write(axes, 30, 40, "here", va="bottom")
        svg = element(inline_svg(figure, name="a", label="", description=""))
    assert svg.attrib["viewBox"] == "0 0 200 100"
    (path,) = [p.attrib["d"] for p in svg.iter("path") if "fill: #ff0000" in p.attrib["style"]]
    corners = [float(number) for number in re.findall(r"[\d.]+", path)]
    assert {*corners} == {20.0, 120.0, 10.0, 60.0}
    (text,) = svg.iter("text")
    assert float(text.attrib["x"]) == pytest.approx(20 + 30)
    assert float(text.attrib["y"]) == pytest.approx(10 + 40, abs=4)  # the baseline


def test_long_names_keep_both_ends() -> None:
    short = shorten("layer4.1.downsample.block.norm", 12)
    assert (len(short), short[:3], short[-4:]) == (12, "lay", "norm")
    assert shorten("conv1", 12) == "conv1"
    assert text_width("mmmm") > text_width("iiii") > 0


# ------------------------------------------------------------ gains


def test_dots_are_as_many_as_clients_and_the_means_are_theirs(tmp_path: Path) -> None:
    groups = groups_of(tmp_path)
    figure = gain_strips(groups, lambda view: view.gain, name="gains", label="Gains")
    assert len(circles(figure)) == 60
    texts = [text.text or "" for text in element(figure).iter("text")]
    for group in groups:
        assert f"{group.label} ({len(group.clients)})" in texts
        assert f"{100 * group.mean_gain:+.1f}" in texts
    assert f"inversion (7) {100 * groups[0].mean_gain:+.1f}" in (figure or "")


def test_dots_stand_at_their_values_and_do_not_hide_each_other(tmp_path: Path) -> None:
    (group,) = groups_of(tmp_path, seen=4, unseen=0, kinds=False)
    values = dict(zip((v.name for v in group.clients), (0.0, 0.1, 0.3, 0.3), strict=True))
    figure = gain_strips([group], lambda view: values[view.name], name="g", label="G")
    xs = sorted(x for x, _ in circles(figure))
    assert (xs[2] - xs[0]) / (xs[1] - xs[0]) == pytest.approx(3, rel=1e-4)
    assert xs[3] == pytest.approx(xs[2])
    (one, other) = (y for x, y in circles(figure) if x == pytest.approx(xs[3]))
    assert abs(one - other) > 5


def test_clients_without_a_value_are_left_out(tmp_path: Path) -> None:
    groups = groups_of(tmp_path)
    some = gain_strips(
        groups, lambda v: v.gain if v.pool == "unseen" else None, name="g", label="G"
    )
    assert len(circles(some)) == 20
    assert gain_strips(groups, lambda view: None, name="g", label="G") is None


# ------------------------------------------------------------ curves


def test_curves_leave_gaps_and_mark_the_lowest_loss() -> None:
    xs, ys = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 1.8, math.nan, 1.0, 1.5]
    figure = learning_curve(xs, ys, name="a", label="loss", percent=False, best=3)
    paths = [p.attrib["d"] for p in element(figure).iter("path") if "M" in p.attrib["d"]]
    assert any(path.count("M") == 2 for path in paths)
    assert "Marked: 1 nats after 3 rounds." in (figure or "")
    gone = learning_curve(xs, [math.nan] * 5, name="a", label="x", percent=True, best=None)
    assert gone is None


# ------------------------------------------------------------ heat maps


def test_one_row_per_client_in_every_map(tmp_path: Path) -> None:
    groups = groups_of(tmp_path)
    mixes, rates = (element(figure) for figure in strategy_maps(groups))
    heights = [
        [float(image.attrib["height"]) for image in svg.iter("image")] for svg in (mixes, rates)
    ]
    sizes = [len(group.clients) for group in groups]
    # A pixel row per client, in each of the maps; the colour bar is an image of one row.
    assert sorted(heights[0]) == sorted([*sizes, *sizes, 1, 1])
    assert sorted(heights[1]) == sorted([*sizes, 1])
    texts = {text.text for svg in (mixes, rates) for text in svg.iter("text")}
    assert {"Divergence", "Mix", "Rate", "Gain", *(group.label for group in groups)} <= texts


def test_few_clients_are_named_with_their_kind(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, seen=4, unseen=0)
    texts = {text.text for text in element(strategy_maps(groups)[0]).iter("text")}
    assert "client-002, noise" in texts


def test_without_batch_norm_there_are_rates_only(tmp_path: Path) -> None:
    (figure,) = strategy_maps(groups_of(tmp_path, norms=()))
    assert {"Rate", "Gain"} <= {text.text for text in element(figure).iter("text")}


def test_descriptions_have_the_means_of_groups(tmp_path: Path) -> None:
    groups = groups_of(tmp_path)
    mixes = [view.mean_mix for view in groups[0].clients]
    assert f"inversion {sum(filter(None, mixes)) / len(mixes):.2f}" in strategy_maps(groups)[0]


def test_a_log_scale_gives_equal_ratios_equal_steps() -> None:
    norm, ends = log_norm([0.01, 1.0, 0.0, math.inf, math.nan, -1.0])
    assert float(norm(0.1)) == pytest.approx(0.5)
    assert ends == ("0.01", "1")
    heat = HeatMap(
        title="", unit="", columns=["a"], values=[[0.0]], colours=TEALS, norm=norm, ends=ends
    )
    grey = matplotlib.colors.to_rgba("#969696")
    assert heat.colour_map(norm(math.nan)) == pytest.approx(grey)
    assert heat.colour_map(norm([0.0]))[0] == pytest.approx(grey)


def test_a_runaway_value_does_not_use_up_the_scale() -> None:
    draw = random.Random(1)
    norm, ends = log_norm([draw.uniform(0.1, 0.3) for _ in range(200)] + [2500.0])
    assert (norm.vmax or 0) < 1
    assert ends[1].startswith("≥")


def test_rows_lie_in_groups_with_gaps() -> None:
    rows = Rows(["a", "b"], [2, 3], 10.0)
    assert rows.middles == [5, 15, 30, 40, 50]
    assert rows.bottom == 55
    assert rows.name_places == [10, 40]
    assert Rows(list("abcde"), [2, 3], 10.0).name_places == rows.middles
