"""t-intervals and the table over seeds."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from fedl2p.reporting.comparison import compare
from fedl2p.reporting.intervals import mean_interval
from fedl2p.runs.results import Report
from support.synthetic_run import make_run


def test_the_interval_of_five_values() -> None:
    values = [0.80, 0.82, 0.79, 0.85, 0.81]
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(0.814)
    half = 2.776445 * statistics.stdev(values) / math.sqrt(5)
    assert interval.bounds == pytest.approx((0.814 - half, 0.814 + half), abs=1e-7)


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert mean_interval([0.5]).bounds is None
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_equal_values_have_an_interval_without_width() -> None:
    assert mean_interval([0.5, 0.5, 0.5]).bounds == (0.5, 0.5)


def test_a_value_that_is_not_a_number_shows() -> None:
    interval = mean_interval([0.5, math.nan])
    assert math.isnan(interval.mean)
    assert interval.half is not None
    assert math.isnan(interval.half)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1, 2)]
    for seed, folder in enumerate(folders):
        make_run(folder, seed=seed)
    return folders


def accuracies(folders: list[Path], method: str, pool: str) -> list[float]:
    return [
        s.accuracy
        for folder in folders
        for s in Report.load(folder).methods
        if (s.method, s.pool) == (method, pool)
    ]


def test_means_and_paired_differences(runs: list[Path]) -> None:
    comparison = compare(runs)
    assert comparison.seeds == (0, 1, 2)
    assert len(comparison.lines) == 16
    line = next(x for x in comparison.lines if (x.method, x.pool) == ("gridsearch", "unseen"))
    theirs = accuracies(runs, "gridsearch", "unseen")
    ours = accuracies(runs, "fedl2p", "unseen")
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert line.accuracy.mean == pytest.approx(statistics.mean(theirs))
    assert line.accuracy.half == pytest.approx(
        4.302653 * statistics.stdev(theirs) / math.sqrt(3), rel=1e-6
    )
    assert line.difference is not None
    assert line.difference.mean == pytest.approx(statistics.mean(gaps))
    assert line.difference.half == pytest.approx(
        4.302653 * statistics.stdev(gaps) / math.sqrt(3), rel=1e-6
    )
    assert line.above == sum(gap > 0 for gap in gaps)


def test_the_reference_has_no_difference_and_the_order_of_folders_does_not_matter(
    runs: list[Path],
) -> None:
    comparison = compare(runs)
    assert all((x.difference is None) == (x.method == "fedl2p") for x in comparison.lines)
    assert compare(runs[::-1]).to_dict() == comparison.to_dict()


def test_the_dictionary_is_json_and_the_text_has_the_numbers(runs: list[Path]) -> None:
    comparison = compare(runs)
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    entry = next(m for m in plain["methods"] if (m["method"], m["pool"]) == ("fedavg", "seen"))
    low, high = entry["accuracy_interval"]
    assert low < entry["accuracy"] < high
    text = str(comparison)
    assert f"{100 * entry['accuracy']:.2f} ± {50 * (high - low):.2f}" in text
    assert f"{100 * entry['difference']:+.2f}" in text
    assert "3 of 3" in text
    assert "unseen clients" in text


def test_harm_and_kinds_are_compared_too(runs: list[Path]) -> None:
    found = compare(runs)
    summaries = [
        next(s for s in Report.load(run).methods if (s.method, s.pool) == ("fedl2p", "unseen"))
        for run in runs
    ]
    (line,) = (n for n in found.lines if (n.method, n.pool) == ("fedl2p", "unseen"))
    assert line.share_worse.mean == statistics.mean(s.share_worse for s in summaries)
    told = found.to_dict()
    assert {m["method"]: m for m in told["methods"]}["local"]["share_worse"] > 0.5
    kinds = {(k["method"], k["kind"]): k for k in told["kinds"] if k["pool"] == "unseen"}
    one = [
        next(
            k
            for k in Report.load(run).kinds
            if (k.method, k.pool, k.kind) == ("fedl2p", "unseen", "blur")
        )
        for run in runs
    ]
    blur = kinds["fedl2p", "blur"]
    assert blur["accuracy"] == pytest.approx(statistics.mean(k.accuracy for k in one))
    assert blur["mix"] == pytest.approx(statistics.mean(k.mix for k in one))
    assert blur["rate"] == pytest.approx(statistics.geometric_mean(k.rate for k in one))
    assert kinds["local", "blur"]["mix"] is None
    text = str(found)
    assert "made worse %" in text
    assert "unseen clients by kind, accuracy %" in text
    assert "fedl2p, mean rate" in text


def test_one_run_has_means_only(runs: list[Path]) -> None:
    comparison = compare(runs[:1])
    assert comparison.lines[0].accuracy.half is None
    assert "one seed: no intervals" in str(comparison)


def test_without_the_reference_it_says_so(runs: list[Path]) -> None:
    comparison = compare(runs, reference="fedbn")
    assert all(line.difference is None for line in comparison.lines)
    assert "fedbn did not run" in str(comparison)


def change(folder: Path, file: str, **fields: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_other_settings_are_refused_by_name(runs: list[Path]) -> None:
    change(runs[2], "config.json", learn={"rounds": 30, "clients_per_round": 10})
    with pytest.raises(ValueError, match=r"learn\.rounds is 25 in .*seed0 but 30 in .*seed2") as e:
        compare(runs)
    assert "learn.strategy is fedavg" in str(e.value)
    assert "absent" in str(e.value)
    assert "\n" not in str(e.value)


def test_another_recipe_is_refused(runs: list[Path]) -> None:
    change(runs[1], "results.json", recipe="smoke")
    with pytest.raises(ValueError, match=r"recipe is digits in .* but smoke in"):
        compare(runs)


def test_seeds_inside_the_settings_may_differ(runs: list[Path]) -> None:
    for i, folder in enumerate(runs):
        change(folder, "config.json", data={"clients": 60, "alpha": 0.5, "seed": i})
    assert len(compare(runs).seeds) == 3


def test_the_same_seed_twice_is_refused(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="both have seed 0"):
        compare([runs[0], runs[1], runs[0]])


def test_a_method_that_is_missing_in_one_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0)
    everyone = {f"client-{i:03d}": "out of memory" for i in range(60)}
    make_run(tmp_path / "b", seed=1, failed=everyone)
    with pytest.raises(ValueError, match="b has no result of fedavg on seen clients"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_no_folder_and_a_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        compare([])
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        compare([tmp_path])


def test_failed_clients_and_other_versions_are_noted(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, failed={"client-003": "out of memory"})
    versions = {"python": "3.11.9", "torch": "2.12.0", "flwr": "1.41.0", "fedl2p": "0.1.0"}
    change(tmp_path / "b", "results.json", versions=versions)
    text = str(compare([tmp_path / "a", tmp_path / "b"]))
    assert "torch is 2.13.0 in" in text
    assert "without a result in" in text
