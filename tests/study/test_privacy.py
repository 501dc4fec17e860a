"""Privacy of a whole study: what results.json, the page and the table say of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedl2p.core.settings import InnerLoop
from fedl2p.data.digits import Digits
from fedl2p.federation.privacy.accounting import Releases, epsilon
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import Settings
from fedl2p.recipes import smoke
from fedl2p.reporting.page import write_page
from fedl2p.runs.results import Report
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study

CENTRAL = Privacy(mechanism="central", noise=2.0, clip=0.05)
LATER = Privacy(mechanism="central", noise=2.0, clip=0.02, delta=1e-6)
LOCAL = Privacy(mechanism="local", noise=20.0, clip=0.002)


def study(pretrain: Privacy, learn: Privacy, *methods: str) -> Study:
    full = smoke()
    return dataclasses.replace(
        full,
        methods=methods,
        data=Digits(seen=6, unseen=2, train=24, validation=12, test=16),
        pretrain=dataclasses.replace(full.pretrain, rounds=3, privacy=pretrain),
        learn=dataclasses.replace(full.learn, rounds=2, privacy=learn),
        settings=dataclasses.replace(full.settings, finetune=InnerLoop(epochs=1, batch_size=12)),
    )


def told(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())["privacy"]
    return content


def test_stages_and_methods_say_what_they_spent(tmp_path: Path) -> None:
    report = run_study(study(CENTRAL, LATER, "fedavg", "local", "bestfixed", "fedl2p"), tmp_path)
    spent = told(tmp_path)
    pretrain, learn = spent["stages"]
    assert pretrain == {
        "stage": "pretrain",
        "mechanism": "central",
        "randomness": "seed",
        "noise": 2.0,
        "clip": 0.05,
        "cohort": 4,
        "population": 6,
        "releases": 3,
        "epsilon": pretrain["epsilon"],
        "delta": 1e-5,
    }
    assert (learn["releases"], learn["mechanism"], learn["delta"]) == (2, "central", 1e-6)
    first = Releases(noise=2.0, cohort=4, population=6, count=3)
    assert pretrain["epsilon"] == pytest.approx(epsilon([first], delta=1e-5))
    both = dataclasses.replace(first, count=5)
    methods = {m["method"]: m for m in spent["methods"]}
    assert methods["fedavg"]["epsilon"] == pytest.approx(pretrain["epsilon"])
    assert methods["fedl2p"]["epsilon"] == pytest.approx(epsilon([both], delta=1e-5))
    assert methods["fedl2p"]["open"] == []
    # It shares nothing; it shares what is not private.
    assert methods["local"]["epsilon"] == 0
    assert methods["bestfixed"]["epsilon"] is None
    assert methods["bestfixed"]["open"] == ["bestfixed has no privacy"]
    assert f"fedl2p {methods['fedl2p']['epsilon']:.3g}" in str(report)
    assert Report.load(tmp_path).privacy == report.privacy
    page = write_page(tmp_path).read_text()
    assert "What was private" in page
    assert f"<td>{methods['fedl2p']['epsilon']:.3g}</td>" in page
    assert "<td>no bound</td>" in page
    assert "whoever knows the seed can subtract it" in page


def test_a_stage_without_privacy_leaves_no_bound_and_no_privacy_leaves_no_word(
    tmp_path: Path,
) -> None:
    run_study(study(Privacy(), CENTRAL, "fedl2p"), tmp_path / "half")
    (half,) = told(tmp_path / "half")["methods"]
    assert (half["epsilon"], half["open"]) == (None, ["pretrain has no privacy"])
    report = run_study(study(Privacy(), Privacy(), "fedl2p"), tmp_path / "none")
    assert told(tmp_path / "none") == {"stages": [], "methods": []}
    assert "privacy" not in str(report)
    assert "What was private" not in write_page(tmp_path / "none").read_text()


@pytest.mark.slow
def test_local_privacy_counts_the_client_asked_most(tmp_path: Path) -> None:
    run_study(study(LOCAL, LOCAL, "fedavg", "fedl2p"), tmp_path)
    pretrain, learn = told(tmp_path)["stages"]
    # Four of six are drawn per round: somebody in every one of 2 rounds, and of 3.
    assert (pretrain["releases"], learn["releases"]) == (3, 2)
    five = Releases(noise=20.0, cohort=4, population=6, count=5, sampled=False)
    methods = {m["method"]: m["epsilon"] for m in told(tmp_path)["methods"]}
    assert methods["fedl2p"] == pytest.approx(epsilon([five], delta=1e-5))
    lines = (tmp_path / "rounds.csv").read_text().splitlines()[1:]
    assert {line.split(",")[3] for line in lines} == {"nan"}
    assert write_page(tmp_path).exists()


def test_central_and_local_have_no_common_epsilon(tmp_path: Path) -> None:
    run_study(study(CENTRAL, LOCAL, "fedl2p"), tmp_path)
    (own,) = told(tmp_path)["methods"]
    assert own["epsilon"] is None
    assert own["open"] == ["central and local privacy have no common epsilon"]


@pytest.mark.slow
def test_an_equal_study_gives_an_equal_result() -> None:
    one, two = (run_study(study(CENTRAL, LATER, "fedl2p")) for _ in range(2))
    assert [r.accuracy for r in one.rows] == [r.accuracy for r in two.rows]
    assert [r.loss for r in one.rows] == [r.loss for r in two.rows]
    assert all(math.isfinite(r.loss) for r in one.rows)


def test_too_few_clients_for_a_rule_end_before_anything_is_written(tmp_path: Path) -> None:
    bad = study(Privacy(), Privacy(), "fedl2p")
    bad = dataclasses.replace(bad, learn=Rounds(rounds=2, clients_per_round=4, robust="krum"))
    with pytest.raises(ValueError, match="robust 'krum' needs 5 good answers in a round"):
        run_study(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_a_study_are_read_back(tmp_path: Path) -> None:
    mine = study(CENTRAL, LOCAL, "local")
    run_study(mine, tmp_path)
    assert Study.load(tmp_path) == mine
    assert isinstance(Study.load(tmp_path).settings, Settings)
