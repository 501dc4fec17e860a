"""Rows, their summary, and results.json with clients.csv."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedl2p.method import Outcome
from fedl2p.runs.results import CLIENT_COLUMNS, Report, Row, summarise
from support.synthetic_run import make_run


def row(client: str, accuracy: float, num_test: int = 10, /, **changes: object) -> Row:
    base = Row(
        method="fedl2p",
        client=client,
        pool="seen",
        num_train=5,
        num_test=num_test,
        accuracy_before=accuracy / 2,
        accuracy=accuracy,
        loss_before=2.0,
        loss=1.0 - accuracy,
        seconds=0.5,
    )
    return replace(base, **changes)


def report(*rows: Row) -> Report:
    return Report(recipe="digits", seed=3, engine="in-process", device="cpu", rows=rows)


def test_means_are_weighted_by_test_examples() -> None:
    (summary,) = summarise([row("a", 1.0, 30), row("b", 0.5, 10, seconds=1.5)])
    assert summary.accuracy == pytest.approx((30 * 1.0 + 10 * 0.5) / 40)
    assert summary.accuracy_before == pytest.approx((30 * 0.5 + 10 * 0.25) / 40)
    assert summary.loss == pytest.approx((30 * 0.0 + 10 * 0.5) / 40)
    assert summary.seconds_per_client == pytest.approx(1.0)
    assert summary.clients == 2


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (40, 4)])
def test_worst_decile_is_the_plain_mean_of_a_tenth_rounded_up(clients: int, worst: int) -> None:
    accuracies = [i / 100 for i in range(clients)]
    # Very different numbers of test examples: they must not matter here.
    rows = [row(f"c{i}", a, 1 + 50 * (i % 2)) for i, a in enumerate(reversed(accuracies))]
    (summary,) = summarise(rows)
    assert summary.accuracy_worst_decile == pytest.approx(sum(accuracies[:worst]) / worst)


@pytest.mark.parametrize(
    ("before", "after", "num_test", "worse"),
    [
        (0.5, 0.5, 10, False),
        (0.5, 0.4, 10, False),  # one test example
        (0.5, 0.3, 10, True),
        (0.9, 1.0, 10, False),
        (0.900, 0.895, 1000, False),  # half a point
        (0.900, 0.894, 1000, True),
        (299 / 300, 298 / 300, 300, False),
        (299 / 300, 297 / 300, 300, True),
    ],
)
def test_a_client_is_made_worse_by_more_than_an_example_and_half_a_point(
    before: float, after: float, num_test: int, worse: bool
) -> None:
    rows = [row("a", after, num_test, accuracy_before=before), row("b", 0.5)]
    assert summarise(rows)[0].share_worse == worse / 2


def test_worse_is_against_the_global_model_where_it_ran() -> None:
    """A method that starts from something else has another accuracy before personalization."""
    scratch = row("a", 0.6, method="local", accuracy_before=0.1)
    assert summarise([scratch])[0].share_worse == 0
    start = row("a", 0.9, method="fedavg", accuracy_before=0.9)
    by_method = {s.method: s.share_worse for s in summarise([scratch, start])}
    assert by_method == {"local": 1.0, "fedavg": 0.0}
    failed = row("a", 0.9, method="fedavg", failure="it ran away")
    assert {s.method: s.share_worse for s in summarise([scratch, failed])} == {"local": 0.0}


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [(2.0, 2.0, 0), (2.0, 2.009, 0), (2.0, 2.011, 1), (-2.0, -1.98, 1), (2.0, math.nan, 1)],
)
def test_without_an_accuracy_a_rise_of_the_loss_is_worse(
    before: float, after: float, worse: int
) -> None:
    void = {"accuracy": math.nan, "accuracy_before": math.nan}
    (summary,) = summarise([row("a", 0.0, loss_before=before, loss=after, **void)])
    assert summary.share_worse == worse


def test_methods_keep_their_order_and_pools_are_apart() -> None:
    rows = [
        row("u", 0.2, pool="unseen", method="local"),
        row("s", 0.4, method="local"),
        row("s", 0.6, method="fedavg"),
    ]
    found = [(s.method, s.pool, s.accuracy) for s in summarise(rows)]
    assert found == [("local", "seen", 0.4), ("local", "unseen", 0.2), ("fedavg", "seen", 0.6)]


def test_failed_clients_and_clients_without_test_examples_do_not_count() -> None:
    untested = row("n", 0.0, 0, accuracy=math.nan, accuracy_before=math.nan, loss=math.nan)
    (summary,) = summarise([row("a", 0.8), row("b", 0.1, failure="it ran away"), untested])
    assert summary.accuracy == pytest.approx(0.8)
    assert summary.accuracy_worst_decile == pytest.approx(0.8)
    assert summary.clients == 2


def test_a_row_takes_the_numbers_of_an_outcome() -> None:
    outcome = Outcome(
        client="c",
        num_train=96,
        num_test=128,
        accuracy_before=0.5,
        accuracy=0.75,
        loss_before=1.5,
        loss=0.7,
        seconds=0.25,
    )
    taken = Row.of("fedl2p", "unseen", outcome)
    assert (taken.client, taken.pool, taken.accuracy, taken.seconds) == ("c", "unseen", 0.75, 0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": "new"}, "seen"),
        ({"accuracy": 71.0}, "fraction"),
        ({"accuracy": math.nan}, "fraction"),
        ({"num_test": -1}, "negative"),
    ],
)
def test_impossible_rows_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        row("a", 0.5, **changes)


def test_two_rows_for_one_client_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows"):
        report(row("a", 0.5), row("a", 0.6))


def test_a_report_survives_its_files(tmp_path: Path) -> None:
    saved = make_run(tmp_path, failed={"client-007": "its loss is not finite"})
    loaded = Report.load(tmp_path)
    assert loaded.methods == saved.methods
    assert [r.client for r in loaded.failures] == ["client-007"] * 8
    assert loaded.failures[0].failure == "its loss is not finite"
    assert (loaded.seed, loaded.versions, loaded.seconds) == (0, saved.versions, saved.seconds)
    assert loaded.bytes_per_client_round == saved.bytes_per_client_round


def test_awkward_client_names_survive(tmp_path: Path) -> None:
    names = ['a,"b"', "'c'", "d;e", "é"]
    report(*(row(name, 0.5) for name in names)).save(tmp_path)
    assert [r.client for r in Report.load(tmp_path).rows] == names


def test_the_files_have_the_fixed_fields(tmp_path: Path) -> None:
    report(row("a", 0.5)).save(tmp_path)
    head = (tmp_path / "clients.csv").read_text().splitlines()[0]
    assert (
        head
        == ",".join(CLIENT_COLUMNS)
        == (
            "method,client,pool,num_train,num_test,accuracy_before,accuracy,loss_before,loss,seconds"
        )
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["methods"][0]) == {
        *("method", "pool", "clients", "accuracy_before", "accuracy"),
        *("accuracy_worst_decile", "share_worse", "loss", "seconds_per_client"),
    }


def test_saving_twice_gives_the_same_bytes_and_leaves_no_other_file(tmp_path: Path) -> None:
    one = report(row("a", 1 / 3), row("b", 0.7))
    one.save(tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    one.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    assert set(first) == {"results.json", "clients.csv"}


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(row("a", 0.5)).save(tmp_path)
    before = (tmp_path / "clients.csv").read_text()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report(row("a", 0.9)).save(tmp_path)
    assert (tmp_path / "clients.csv").read_text() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_diverged_loss_is_null_in_json_and_comes_back(tmp_path: Path) -> None:
    report(row("a", 0.5, loss=math.inf), row("b", 0.5, loss=-math.inf)).save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["methods"][0]["loss"] is None
    assert Report.load(tmp_path).rows[0].loss == math.inf


@pytest.mark.parametrize("file", ["results.json", "clients.csv"])
def test_a_missing_file_is_named_with_its_remedy(tmp_path: Path, file: str) -> None:
    report(row("a", 0.5)).save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing; .*--resume") as caught:
        Report.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("results.json", '"seed": 3', '"seed": ', "not JSON"),
        ("results.json", '"engine"', '"motor"', "engine is missing"),
        ("results.json", '"seed": 3', '"seed": "x"', "seed is 'x', but must be a valid integer"),
        ("clients.csv", "num_test", "tests", "no column num_test"),
        (
            "clients.csv",
            ",0.5,",
            ",half,",
            "line 2: accuracy is 'half', but must be a valid number",
        ),
        ("clients.csv", ",0.5,", ",0.5,9,", "one field per column"),
        ("clients.csv", ",seen,", ",known,", "pool"),
        ("clients.csv", ",0.5,", ",0.4,", "adds up"),
        ("clients.csv", "fedl2p", "fedavg", "only"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, old: str, new: str, words: str) -> None:
    report(row("a", 0.5)).save(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=words) as caught:
        Report.load(tmp_path)
    assert "damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_text_table_has_every_method(tmp_path: Path) -> None:
    saved = make_run(tmp_path, failed={"client-007": "its loss is not finite"})
    table = str(saved)
    assert all(s.method in table for s in saved.methods)
    assert f"{100 * saved.methods[0].accuracy:.2f}" in table
    assert "without a result: client-007" in table


@pytest.mark.slow
def test_a_report_does_not_need_jinja2() -> None:
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        "import fedl2p.runs.results, fedl2p.reporting.comparison, fedl2p.reporting.page"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
