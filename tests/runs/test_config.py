"""Settings survive JSON, and JSON that does not fit is refused in one clear line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import pytest

from fedl2p.runs.config import differences, from_plain, to_plain


class Shape(Protocol):
    def area(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Square:
    side: float = 1.0

    def __post_init__(self) -> None:
        if self.side <= 0:
            raise ValueError(f"side is {self.side}, but must be above 0")

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True, kw_only=True)
class Inner:
    rates: tuple[float, ...] = (0.1, 0.3)
    pair: tuple[int, str] = (1, "a")


@dataclass(frozen=True, kw_only=True)
class Outer:
    shape: Shape
    inner: Inner = field(default_factory=Inner)
    path: Path | None = None
    mode: Literal["slow", "fast"] = "slow"
    on: bool = True
    count: int = 3


def through_json(value: object) -> object:
    return json.loads(json.dumps(to_plain(value)))


def test_round_trip_is_the_identity() -> None:
    outer = Outer(shape=Square(side=2), inner=Inner(rates=()), path=Path("a/b"), mode="fast")
    assert from_plain(Outer, through_json(outer)) == outer
    assert from_plain(Outer, through_json(Outer(shape=Square()))) == Outer(shape=Square())


def test_a_field_whose_type_names_no_class_says_which_one() -> None:
    plain = to_plain(Outer(shape=Square()))
    assert plain["shape"]["kind"].endswith(":Square")
    assert "kind" not in plain["inner"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 1.5}, "count is 1.5, but must be int"),
        ({"count": True}, "count is True, but must be int"),
        ({"mode": "medium"}, "mode is 'medium', but must be one of"),
        ({"inner": {"rates": ["x"]}}, r"inner.rates\[0\] is 'x', but must be a number"),
        ({"inner": {"pair": [1]}}, "inner.pair is .*, but must be a list of 2 values"),
        ({"inner": {"rate": 1}}, "unknown field 'inner.rate'; Inner has pair, rates"),
        ({"inner": 5}, "inner is 5, but must be a group of fields"),
        ({"shape": {"kind": "no.such:Thing"}}, "'no.such' is not imported; if it is yours"),
        ({"shape": {"kind": "fedl2p.no:Thing"}}, "there is no class 'fedl2p.no:Thing'"),
        ({"shape": {"kind": "pathlib:Thing"}}, "there is no class 'pathlib:Thing'"),
        ({"inner": {"rates": [10**400]}}, r"inner.rates\[0\] is larger than any float"),
        ({"shape": {"kind": "pathlib:Path"}}, "is not a dataclass"),
        ({"shape": {"kind": f"{__name__}:Square", "side": -1}}, "side is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str) -> None:
    plain = to_plain(Outer(shape=Square())) | change
    with pytest.raises(ValueError, match=said):
        from_plain(Outer, plain)


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        from_plain(Outer, {})


def test_differences_name_the_field() -> None:
    a = Outer(shape=Square())
    assert differences(a, a) == []
    b = Outer(shape=Square(side=3), inner=Inner(rates=(0.1,)))
    assert differences(a, b) == [
        "shape.side is 1.0 and 3",
        "inner.rates is (0.1, 0.3) and (0.1,)",
    ]


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(ValueError, match="type set has no JSON form"):
        to_plain({"a": {1, 2}})


def test_reading_settings_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_settings.py").write_text("raise SystemExit('this code has run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = to_plain(Outer(shape=Square())) | {"shape": {"kind": "hostile_settings:Thing"}}
    with pytest.raises(ValueError, match="'hostile_settings' is not imported"):
        from_plain(Outer, plain)
