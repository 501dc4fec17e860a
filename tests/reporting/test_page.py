"""The page: its numbers, its words, that it stands alone, and how it degrades."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from fedl2p.reporting.axes import Axis
from fedl2p.reporting.client_views import client_views, group_views, kind_key
from fedl2p.reporting.curves import curve
from fedl2p.reporting.findings import headline, statements
from fedl2p.reporting.number_formats import seconds
from fedl2p.reporting.page import write_page
from fedl2p.reporting.svg import NO_VALUE, TEALS, Scale, nice_ticks, png, shorten
from fedl2p.runs.reading import read_run
from support.html import Tags
from support.synthetic_run import NORMS, make_run

pytest.importorskip("jinja2")


def page_of(folder: Path, **options: object) -> tuple[str, str]:
    make_run(folder, **options)
    page = write_page(folder).read_text(encoding="utf-8")
    return page, Tags(page).text


def test_the_page_has_the_numbers(tmp_path: Path) -> None:
    _, text = page_of(tmp_path)
    for summary in read_run(tmp_path).report.methods:
        for value in (summary.accuracy_before, summary.accuracy, summary.accuracy_worst_decile):
            assert f"{100 * value:.1f}" in text
        assert f"{summary.loss:.3f}" in text
        assert f" {seconds(summary.seconds_per_client)} " in text
    for words in ("52.8 kB", "2.13.0", "learn.clients_per_round", "inversion", *NORMS):
        assert words in text


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path)
    tags = Tags(page)
    assert "script" not in {tag for tag, _, _ in tags.attributes}
    assert not re.search(r"https?:|url\(|@import|<link|<script|<iframe", page)
    loading = [v for _, name, v in tags.attributes if name in ("src", "href", "xlink:href")]
    assert loading
    assert all(value.startswith("data:image/png;base64,") for value in loading)
    assert len(page) < 300_000


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path)
    assert write_page(tmp_path).read_text(encoding="utf-8") == page


def test_a_stage_of_one_round_has_no_curve_and_the_judging_pass_is_no_round(
    tmp_path: Path,
) -> None:
    page, text = page_of(tmp_path)
    assert "One round only, so no curve: One mix and rate for all." in text
    assert "25 rounds, 10 clients a round" in text
    assert page.count("loss by round") == 2


def test_the_headline_compares_with_the_best_fixed_strategy_and_the_search(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = read_run(tmp_path)
    table = {s.method: s.accuracy for s in run.report.methods if s.pool == "unseen"}
    gap = 100 * (table["fedl2p"] - table["bestfixed"])
    assert gap > 0
    words = headline(run, "fedl2p")
    assert f"FedL2P reaches {100 * table['fedl2p']:.1f} % on unseen clients" in words
    assert f"{gap:.1f} points above the best fixed strategy (one mix and rate for all)" in words
    assert "grid search per client" in words


def test_the_headline_says_when_it_loses(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, share=0.2)
    run = read_run(tmp_path)
    table = {s.method: s.accuracy for s in run.report.methods if s.pool == "unseen"}
    gap = 100 * (table["bestfixed"] - table["fedl2p"])
    assert gap > 1
    assert f"{gap:.1f} points below the best fixed strategy" in headline(run, "fedl2p")
    assert f"−{gap:.1f} points" in text  # noqa: RUF001  (the page writes a true minus sign)
    assert "points above" not in text


def test_who_gained_and_why_in_words(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = read_run(tmp_path)
    views = client_views(run, "fedl2p", rival="finetuning-client")
    words = " ".join(statements(run, "fedl2p", views))
    up = sum(view.row.accuracy > view.row.accuracy_before for view in views)
    assert f"makes {up} of 60 clients more accurate" in words
    assert "By sensor, the largest gains are those of inversion" in words
    assert "The farther a client's data lie from the global model, the more it gains" in words
    assert "The nearest third of clients mixes in" in words


def test_gains_and_groups(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = read_run(tmp_path)
    views = client_views(run, "fedl2p", rival="finetuning-client")
    rows = {(r.method, r.client): r for r in run.report.rows}
    for view in views:
        own = rows["fedl2p", view.name]
        assert view.gain == own.accuracy - own.accuracy_before
        assert view.against == own.accuracy - rows["finetuning-client", view.name].accuracy
        assert view.kind == run.about[view.name]["sensor"]
    groups = group_views(views)
    means = [group.mean_gain for group in groups]
    assert means == sorted(means, reverse=True)
    assert {group.label for group in groups if group.only_unseen} == {"occlusion", "contrast"}
    assert sum(len(group.clients) for group in groups) == 60


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    name = '<script>alert("{}")</script>&'
    page, _ = page_of(tmp_path, name=name, failed={name.format(3): "<b>bad</b>"}, seen=6, unseen=3)
    assert "<script" not in page
    assert "<b>bad" not in page
    assert "&lt;script&gt;alert(" in page


def test_without_meta_nets(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, methods=("fedavg", "finetuning-client", "bestfixed"))
    assert "One mix and rate for all reaches" in text
    assert "above the best other fixed strategy" in text
    assert "No method of this run learned its strategy" in text


def test_without_batch_norm(tmp_path: Path) -> None:
    page, text = page_of(tmp_path, norms=())
    assert "no batch-norm layer" in text
    assert "Rate: heat map" in page
    assert "Mix: heat map" not in page
    assert "Profile: heat map" not in page


def test_without_unseen_clients(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, unseen=0)
    assert "on seen clients" in text
    assert "Unseen" not in text


def test_four_clients_are_named(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, seen=4, unseen=0)
    assert re.search(r"<text[^>]*>client-002</text>", page)


def test_a_thousand_clients_and_a_deep_model_stay_small_and_legible(tmp_path: Path) -> None:
    norms = tuple(f"layer{i // 5}.{i % 5}.a_rather_long_name_of_a_block.bn" for i in range(20))
    params = tuple(f"layer{i // 15}.{i % 15}.conv.weight" for i in range(62))
    page, _ = page_of(tmp_path, seen=800, unseen=200, norms=norms, params=params)
    assert len(page.encode()) < 2_000_000
    names = re.findall(r'<text[^>]*class="column">([^<]*)</text>', page)
    assert len(names) < 50
    assert max(map(len, names)) <= 26


def test_a_failed_client_is_listed_with_its_reason(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, failed={"client-041": "no batch of two samples"})
    assert "Clients without a result" in text
    assert "client-041 (unseen): no batch of two samples" in text


def test_strategies_that_stayed_with_their_clients(tmp_path: Path) -> None:
    make_run(tmp_path)
    for path in sorted((tmp_path / "clients" / "fedl2p").iterdir())[:20]:
        path.unlink()
    assert "Strategies of 40 of 60 clients are shown" in Tags(write_page(tmp_path).read_text()).text
    for path in (tmp_path / "clients" / "fedl2p").iterdir():
        path.unlink()
    assert "stayed with the clients" in Tags(write_page(tmp_path).read_text()).text


def test_clients_without_kind_are_grouped_by_pool(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, kinds=False)
    assert "unseen clients20 clients" in text.replace(" 20", "20")
    assert "By sensor" not in text


def test_a_text_that_names_every_client_is_no_kind(tmp_path: Path) -> None:
    make_run(tmp_path)
    population = json.loads((tmp_path / "population.json").read_text())
    for name, entry in population["clients"].items():
        entry["about"] = {"speaker": f"id of {name}"}
    (tmp_path / "population.json").write_text(json.dumps(population))
    assert kind_key(read_run(tmp_path)) is None


def test_many_kinds_are_put_together(tmp_path: Path) -> None:
    make_run(tmp_path)
    population = json.loads((tmp_path / "population.json").read_text())
    for i, entry in enumerate(population["clients"].values()):
        entry["about"] = {"city": f"city {i % 25}"}
    (tmp_path / "population.json").write_text(json.dumps(population))
    run = read_run(tmp_path)
    groups = group_views(client_views(run, "fedl2p", rival=None))
    assert len(groups) == 16
    assert "other kinds" in {group.label for group in groups}


@pytest.mark.parametrize(
    "file", ["config.json", "results.json", "clients.csv", "rounds.csv", "population.json"]
)
def test_a_missing_file_is_named_with_its_remedy(tmp_path: Path, file: str) -> None:
    make_run(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing; .*--resume") as caught:
        write_page(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "[]", "not an object"),
        ("population.json", "{}", "no field 'clients'"),
        ("population.json", '{"clients": {"a": 1}}', "entry of client 'a'"),
        ("population.json", '{"clients": {}}', "lacks client"),
        ("rounds.csv", "stage,round\n", "no column clients"),
        ("rounds.csv", None, "not a whole number"),
        ("clients/fedl2p/0.json", '{"client": "client-000"}', "no field"),
        ("clients/fedl2p/0.json", None, "objects of numbers"),
        ("clients/fedl2p/0.json", "\0", "not JSON"),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, file: str, content: str | None, words: str
) -> None:
    make_run(tmp_path)
    path = tmp_path / file
    if content is None:
        text = path.read_text()
        content = text.replace("pretrain,1,10", "pretrain,1.5,10").replace('"mix": {', '"mix": [{')
        content = re.sub(r"(\"mix\": \[\{[^}]*\})", r"\1]", content)
        assert content != text
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        write_page(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        write_page(tmp_path / "nowhere")


def test_curves_leave_gaps_and_mark_the_lowest_loss() -> None:
    xs, ys = [0.0, 1.0, 2.0, 3.0], [2.0, float("nan"), 1.0, 1.5]
    drawn = curve(xs, ys, label="loss", percent=False, best=2)
    path = re.search(r' d="([^"]*)"', drawn)
    assert path is not None
    assert path[1].count("M") == 2
    assert 'cx="66.67%"' in drawn
    assert "No finite value" in curve(xs, [float("nan")] * 4, label="x", percent=True, best=None)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 47, [-10, 0, 10, 20, 30, 40, 50]), (2, 2, None)],
)
def test_ticks_are_round_and_enclose(low: float, high: float, ticks: list[float] | None) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    if ticks:
        assert found == pytest.approx(ticks)


def test_an_axis_places_linearly() -> None:
    axis = Axis.around([0.0, 10.0])
    assert (axis.place(axis.low), axis.place(axis.high)) == (0, 1)
    assert axis.across((axis.low + axis.high) / 2) == "50.00%"


def test_a_log_scale_gives_equal_ratios_equal_steps() -> None:
    scale = Scale(((0, 0, 0), (200, 200, 200)), 0.01, 1.0, log=True)
    assert scale.colour(0.1) == (100, 100, 100)
    assert scale.colour(1e-9) == (0, 0, 0)
    assert scale.colour(float("inf")) == (200, 200, 200)
    assert scale.colour(0.0) == scale.colour(None) == scale.colour(float("nan")) == NO_VALUE


def test_a_runaway_value_does_not_use_up_the_scale() -> None:
    scale = Scale.logarithmic(TEALS, [0.1 + i / 1000 for i in range(200)] + [2500.0])
    assert scale.high < 1
    assert scale.clipped
    assert "≥" in scale.legend()


def test_an_image_holds_its_pixels() -> None:
    pixels = [[(1, 2, 3), (4, 5, 6)], [(7, 8, 9), (250, 251, 252)]]
    data = base64.b64decode(png(pixels).split(",")[1])
    assert struct.unpack(">II", data[16:24]) == (2, 2)
    (length,) = struct.unpack(">I", data[33:37])
    raw = zlib.decompress(data[41 : 41 + length])
    assert raw == bytes([0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 250, 251, 252])


def test_seconds_are_short() -> None:
    values = (0.0, 3.72e-5, 0.0419, 5.372, 47.21, 310.4, float("nan"))
    assert " ".join(map(seconds, values)) == "0 <0.001 0.042 5.37 47.2 310 \N{EN DASH}"


def test_few_clients_allow_no_word_on_distance(tmp_path: Path) -> None:
    make_run(tmp_path, seen=8, unseen=0)
    run = read_run(tmp_path)
    views = client_views(run, "fedl2p", rival=None)
    near_to_far = sorted(views, key=lambda view: view.distance or 0.0)

    def words(gains: tuple[int, ...]) -> str:
        mixed = [
            replace(view, gain=gain / 10) for view, gain in zip(near_to_far, gains, strict=True)
        ]
        return " ".join(statements(run, "fedl2p", mixed))

    # rank correlations 1 - 6 * sum d^2 / 504: 0.5 may be chance with 8 clients, 0.98 is not
    assert "says little about its gain (rank correlation +0.50)" in words((4, 1, 0, 5, 2, 7, 3, 6))
    assert "the more it gains (rank correlation +0.98)" in words((1, 0, 2, 3, 4, 5, 6, 7))


def test_long_names_keep_both_ends() -> None:
    short = shorten("layer4.1.downsample.block.norm", 12)
    assert (len(short), short[:3], short[-4:]) == (12, "lay", "norm")
    assert shorten("conv1", 12) == "conv1"
