"""Summaries by kind of client."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedl2p.runs.client_files import ClientHyperparams
from fedl2p.runs.kinds import MOST_KINDS, OTHERS, kind_key, kinds_of, summarise_kinds
from fedl2p.runs.results import Pool, Report, Row, Summary
from support.synthetic_run import make_run

ABOUT = {"a": {"size": 3, "kind": "tiny"}, "b": {"kind": "clean"}, "c": {"kind": "tiny"}}


def row(client: str, accuracy: float, method: str = "fedl2p", pool: Pool = "unseen") -> Row:
    return Row(
        method=method,
        client=client,
        pool=pool,
        num_train=5,
        num_test=10,
        accuracy_before=0.5,
        accuracy=accuracy,
        loss_before=2.0,
        loss=1.0,
        seconds=0.5,
    )


def strategy(client: str, mixes: list[float], rates: list[float]) -> ClientHyperparams:
    nothing = dict.fromkeys(("divergence", "moments", "gradients", "loss", "labels", "size"))
    return ClientHyperparams(
        client=client,
        method="fedl2p",
        mix={str(i): m for i, m in enumerate(mixes)},
        rate={str(i): r for i, r in enumerate(rates)},
        **nothing,
    )


def test_kinds_by_hand() -> None:
    rows = [row("a", 1.0), row("b", 0.9), row("c", 0.2), row("c", 0.6, "local")]
    known = {"a": strategy("a", [0.0, 0.5], [0.1, 0.1]), "c": strategy("c", [0.75], [0.001])}
    clean, tiny, tiny_local = summarise_kinds(rows, ABOUT, {"fedl2p": known})
    assert [(k.kind, k.method, k.clients) for k in (clean, tiny, tiny_local)] == [
        *(("clean", "fedl2p", 1), ("tiny", "fedl2p", 2)),
        ("tiny", "local", 1),
    ]
    assert tiny.accuracy == pytest.approx(0.6)
    assert tiny.share_worse == 0.5
    assert tiny.mix == pytest.approx((0.25 + 0.75) / 2)
    assert tiny.rate == pytest.approx(0.01)
    assert math.isnan(clean.mix)
    assert math.isnan(tiny_local.rate)


def test_clients_without_kinds_have_no_summaries() -> None:
    assert summarise_kinds([row("a", 1.0)], {"a": {"size": 3}}, {}) == ()
    everyone = {f"c{i}": {"name": f"n{i}"} for i in range(MOST_KINDS + 1)}
    assert kind_key(everyone) is None
    assert kinds_of(everyone, everyone) is None


def test_the_rarest_of_many_kinds_are_put_together() -> None:
    about = {f"c{i}": {"kind": f"k{i // 2}"} for i in range(2 * MOST_KINDS + 2)}
    kinds = kinds_of(about, about)
    assert kinds is not None
    assert len(set(kinds.values())) == MOST_KINDS
    assert OTHERS in kinds.values()


def test_kinds_are_in_results_json_and_add_up(tmp_path: Path) -> None:
    report = make_run(tmp_path, failed={"client-007": "it ran away"})
    told = json.loads((tmp_path / "results.json").read_text())
    for whole in told["methods"]:
        of = [k for k in told["kinds"] if all(k[n] == whole[n] for n in ("method", "pool"))]
        assert sum(k["clients"] for k in of) == whole["clients"]
        worse = sum(k["clients"] * k["share_worse"] for k in of) / whole["clients"]
        assert worse == pytest.approx(whole["share_worse"])
        assert {*Summary.__dataclass_fields__, "kind", "mix", "rate"} == set(of[0])
    assert repr(Report.load(tmp_path).kinds) == repr(report.kinds)  # NaN is not equal to itself
    mixes = {k["mix"] for k in told["kinds"] if k["method"] == "fedl2p"}
    assert len(mixes) > 3
    assert all(k["mix"] is None for k in told["kinds"] if k["method"] == "local")
