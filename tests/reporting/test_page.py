"""The page: its numbers, its words, that it stands alone, and how it degrades."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedl2p.reporting.client_views import client_views, group_views, kind_key
from fedl2p.reporting.findings import headline, statements
from fedl2p.reporting.first_screen import cards
from fedl2p.reporting.number_formats import seconds
from fedl2p.reporting.page import write_page
from fedl2p.runs.reading import read_run
from support.html import Tags
from support.synthetic_run import NORMS, make_run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


def page_of(folder: Path, **options: object) -> tuple[str, str]:
    make_run(folder, **options)
    page = write_page(folder).read_text(encoding="utf-8")
    return page, Tags(page).text


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a made-up run with its page; not to be changed."""
    folder = tmp_path_factory.mktemp("usual") / "run"
    page_of(folder)
    return folder


def shown(folder: Path) -> tuple[str, str]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page, Tags(page).text


def test_the_page_has_the_numbers(usual: Path) -> None:
    _, text = shown(usual)
    for summary in read_run(usual).report.methods:
        for value in (summary.accuracy_before, summary.accuracy, summary.accuracy_worst_decile):
            assert f"{100 * value:.1f}" in text
        assert f"{summary.loss:.3f}" in text
        assert f" {seconds(summary.seconds_per_client)} " in text
    for words in ("52.8 kB", "2.13.0", "learn.clients_per_round", "inversion", *NORMS):
        assert words in text


def test_the_page_loads_nothing(usual: Path) -> None:
    page, _ = shown(usual)
    tags = Tags(page)
    assert "script" not in {tag for tag, _, _ in tags.attributes}
    assert not re.search(r"https?:|url\((?!#)|@import|<link|<script|<iframe", page)
    loading = [v for _, name, v in tags.attributes if name in ("src", "href", "xlink:href")]
    assert loading
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in loading)
    assert len(page) < 300_000


def test_ids_are_unique_and_every_figure_is_described(usual: Path) -> None:
    page, _ = shown(usual)
    ids = [value for _, name, value in Tags(page).attributes if name == "id"]
    assert len(set(ids)) == len(ids) > 0
    figures = re.findall(r'<svg [^>]*aria-label="[^"]{10,}"[^>]*><desc>[^<]{10,}</desc>', page)
    assert len(figures) == page.count("<svg") == 2 + 2 + 2 * 2  # gains, maps, curves of two stages


def test_the_same_folder_gives_the_same_page(usual: Path, tmp_path: Path) -> None:
    shutil.copytree(usual, tmp_path / "copy")
    assert write_page(tmp_path / "copy").read_bytes() == (usual / "report.html").read_bytes()


def test_a_stage_of_one_round_has_no_curve_and_the_judging_pass_is_no_round(usual: Path) -> None:
    page, text = shown(usual)
    assert "One round only, so no curve: One mix and rate for all." in text
    assert "25 rounds, 10 clients a round" in text
    assert page.count("loss by round") == 2


def test_the_headline_compares_with_the_best_fixed_strategy_and_the_search(usual: Path) -> None:
    run = read_run(usual)
    table = {s.method: s.accuracy for s in run.report.methods if s.pool == "unseen"}
    gap = 100 * (table["fedl2p"] - table["bestfixed"])
    assert gap > 0
    words = headline(run, "fedl2p")
    assert words.startswith("FedL2P takes unseen clients from ")
    assert f" to {100 * table['fedl2p']:.1f} %: " in words
    assert f"{gap:.1f} points above the best fixed strategy (one mix and rate for all)" in words
    assert "grid search per client" in words


def test_the_page_says_who_is_made_worse_and_has_the_kinds(usual: Path) -> None:
    run = read_run(usual)
    worse = {s.method: s.share_worse for s in run.report.methods if s.pool == "unseen"}
    assert worse["local"] > worse["fedl2p"]
    _, text = shown(usual)
    assert re.search(rf"{100 * worse['fedl2p']:.0f} %\s*of the unseen clients are made", text)
    assert f"the best fixed strategy: {100 * worse['bestfixed']:.0f} %" in text
    assert "Its data profile (divergences; the divergence says" in text
    assert "By kind of client" in text
    for one in run.report.kinds:
        if (one.method, one.pool) == ("fedl2p", "unseen"):
            assert re.search(rf"{one.kind}\s*{one.clients}\s", text)
            assert f"{100 * one.accuracy:.1f} ({100 * one.share_worse:.0f})" in text
            assert f"{one.mix:.2f}" in text


def test_the_first_screen_answers_four_questions(usual: Path) -> None:
    run = read_run(usual)
    views = client_views(run, "fedl2p", baseline=None)
    four = {card.title: card for card in cards(run, "fedl2p", views)}
    assert list(four) == ["What was gained", "For whom", "Who lost", "What it cost"]
    table = {(s.method, s.pool): s for s in run.report.methods}
    unseen = table["fedl2p", "unseen"]
    gained = 100 * (unseen.accuracy - unseen.accuracy_before)
    assert four["What was gained"].value == f"{gained:+.1f} points"
    of_unseen = [view for view in views if view.pool == "unseen"]
    up = sum(view.gain > 0.0005 for view in of_unseen)
    assert four["For whom"].value == f"{up} of {len(of_unseen)}"
    assert four["Who lost"].value == f"{100 * unseen.share_worse:.0f} %"
    learning = [line for line in run.rounds if line.stage == "learn"]
    assert four["What it cost"].value == f"{seconds(sum(r.seconds for r in learning))} s, once"
    assert four["What it cost"].details[0].startswith("25 rounds of learning; then ")


def test_kinds_and_clients_that_lose_are_named(usual: Path) -> None:
    run = read_run(usual)
    views = client_views(run, "fedl2p", baseline=None)
    losing = next(view for view in views if view.pool == "unseen")
    views = tuple(
        replace(v, kind="losers", gain=-0.25) if v.name == losing.name else v for v in views
    )
    details = cards(run, "fedl2p", views)[2].details
    assert "losers: \N{MINUS SIGN}25.0 points (1 client)" in details
    assert details[-1] == f"{losing.name} loses most: \N{MINUS SIGN}25.0 points"


def test_of_losses_too(tmp_path: Path) -> None:
    """Where a loss has no accuracy, the same four are answered by it."""
    page_of(tmp_path)
    run = read_run(tmp_path)
    rows = [replace(r, accuracy=math.nan, accuracy_before=math.nan) for r in run.report.rows]
    run = replace(run, report=replace(run.report, rows=tuple(rows)))
    views = client_views(run, "fedl2p", baseline=None)
    four = {card.title: card for card in cards(run, "fedl2p", views)}
    (loss,) = (s.loss for s in run.report.methods if (s.method, s.pool) == ("fedl2p", "unseen"))
    assert four["What was gained"].value == f"loss {loss:.4g}"
    assert "better their starting model" not in " ".join(four["For whom"].details)
    assert cards(run, "no such method", views) == []


def test_the_headline_says_when_it_loses(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, share=0.2)
    run = read_run(tmp_path)
    table = {s.method: s.accuracy for s in run.report.methods if s.pool == "unseen"}
    gap = 100 * (table["bestfixed"] - table["fedl2p"])
    assert gap > 1
    assert f"{gap:.1f} points below the best fixed strategy" in headline(run, "fedl2p")
    assert f"−{gap:.1f} points" in text  # noqa: RUF001  (the page writes a true minus sign)
    assert "points above" not in text


def test_who_gained_and_why_in_words(usual: Path) -> None:
    run = read_run(usual)
    views = client_views(run, "fedl2p", baseline="finetuning-client")
    words = " ".join(statements(run, "fedl2p", views))
    up = sum(view.row.accuracy > view.row.accuracy_before for view in views)
    down = [view for view in views if view.row.accuracy < view.row.accuracy_before]
    assert f"above on {up}, below on {len(down)} of 60 clients" in words
    assert f"{min(down, key=lambda view: view.gain).name} loses most" in words
    assert "By sensor, the largest gains are those of inversion" in words
    assert "The farther a client's data lie from the global model, the more it gains" in words


def test_gains_and_groups(usual: Path) -> None:
    run = read_run(usual)
    views = client_views(run, "fedl2p", baseline="finetuning-client")
    rows = {(r.method, r.client): r for r in run.report.rows}
    for view in views:
        own = rows["fedl2p", view.name]
        assert view.gain == own.accuracy - own.accuracy_before
        assert view.over_baseline == own.accuracy - rows["finetuning-client", view.name].accuracy
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
    assert "One mix and rate for all takes unseen clients from" in text
    assert "above the best other fixed strategy" in text
    assert "No method of this run learned its strategy" in text


def test_without_batch_norm(tmp_path: Path) -> None:
    page, text = page_of(tmp_path, norms=())
    assert "no batch-norm layer" in text
    assert ">Rate</text>" in page
    assert ">Mix</text>" not in page
    assert ">Divergence</text>" not in page


def test_without_unseen_clients(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, unseen=0)
    assert "FedL2P takes seen clients from" in text
    assert "Unseen" not in text


@pytest.mark.slow
def test_a_thousand_clients_and_a_deep_model_stay_small_and_legible(tmp_path: Path) -> None:
    norms = tuple(f"layer{i // 5}.{i % 5}.a_rather_long_name_of_a_block.bn" for i in range(20))
    params = tuple(f"layer{i // 15}.{i % 15}.conv.weight" for i in range(62))
    page, _ = page_of(tmp_path, seen=800, unseen=200, norms=norms, params=params)
    assert len(page.encode()) < 2_000_000
    names = re.findall(r"<text[^>]*rotate\(-90 [^>]*>([^<]*)</text>", page)
    assert 0 < len(names) < 60
    assert max(map(len, names)) <= 26


def test_a_failed_client_is_listed_with_its_reason(tmp_path: Path) -> None:
    _, text = page_of(tmp_path, failed={"client-041": "no batch of two samples"})
    assert "Clients without a result" in text
    assert "client-041 (unseen): no batch of two samples" in text


def test_clients_that_failed_alike_share_a_line(tmp_path: Path) -> None:
    names = ("client-041", "client-045")
    _, text = page_of(tmp_path, failed=dict.fromkeys(names, "it diverged"))
    assert "client-041, client-045 (unseen): it diverged" in text


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
    assert "unseen clients (20)" in text
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
    groups = group_views(client_views(run, "fedl2p", baseline=None))
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
        ("population.json", "{}", "classes is missing"),
        ("population.json", '{"classes": 2, "shape": [1], "clients": {"a": 1}}', "clients.a is 1"),
        ("population.json", '{"classes": 2, "shape": [1], "clients": {}}', "lacks client"),
        ("rounds.csv", "stage,round\n", "no column clients"),
        ("rounds.csv", None, "line 2: round is .1.5., but must be a valid integer"),
        ("clients/fedl2p/0.json", '{"client": "client-000"}', "method is missing"),
        ("clients/fedl2p/0.json", None, "mix is .*, but must be"),
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


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "scipy"])
def test_a_missing_package_is_named_with_its_remedy(
    usual: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(usual, tmp_path / "copy")
    (tmp_path / "copy" / "report.html").unlink()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}.*fedl2p\[report\]"):
        write_page(tmp_path / "copy")
    assert not (tmp_path / "copy" / "report.html").exists()


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        write_page(tmp_path / "nowhere")


def test_seconds_are_short() -> None:
    values = (0.0, 3.72e-5, 0.0419, 5.372, 47.21, 310.4, float("nan"))
    assert " ".join(map(seconds, values)) == "0 <0.001 0.042 5.37 47.2 310 \N{EN DASH}"


def test_few_clients_allow_no_word_on_distance(tmp_path: Path) -> None:
    make_run(tmp_path, seen=8, unseen=0)
    run = read_run(tmp_path)
    views = client_views(run, "fedl2p", baseline=None)
    near_to_far = sorted(views, key=lambda view: view.distance or 0.0)

    def words(gains: tuple[int, ...]) -> str:
        mixed = [
            replace(view, gain=gain / 10) for view, gain in zip(near_to_far, gains, strict=True)
        ]
        return " ".join(statements(run, "fedl2p", mixed))

    # rank correlations 1 - 6 * sum d^2 / 504: 0.5 may be chance with 8 clients, 0.98 is not
    assert "says little about its gain (rank correlation +0.50)" in words((4, 1, 0, 5, 2, 7, 3, 6))
    assert "the more it gains (rank correlation +0.98)" in words((1, 0, 2, 3, 4, 5, 6, 7))
