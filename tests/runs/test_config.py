"""Settings survive JSON, and JSON that does not fit is refused in one clear line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pytest

from fedl2p.runs.config import AnyKind, differences, with_absolute_paths
from fedl2p.runs.validation import from_plain, to_plain
from fedl2p.study.settings import Study


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
    shape: Annotated[Shape, AnyKind()]
    inner: Inner = field(default_factory=Inner)
    path: Path | None = None
    mode: Literal["slow", "fast"] = "slow"
    on: bool = True
    count: int = 3
    limit: float | None = None


def through_json(value: object) -> object:
    return json.loads(json.dumps(to_plain(value)))


def test_round_trip_is_the_identity() -> None:
    outer = Outer(shape=Square(side=2), inner=Inner(rates=()), path=Path("a/b"), mode="fast")
    assert from_plain(Outer, through_json(outer)) == outer
    assert from_plain(Outer, through_json(Outer(shape=Square()))) == Outer(shape=Square())


def test_numbers_that_json_lacks_come_back() -> None:
    endless = Outer(shape=Square(side=math.inf), limit=-math.inf)
    assert from_plain(Outer, through_json(endless)) == endless
    again: Any = from_plain(Outer, through_json(Outer(shape=Square(), limit=math.nan)))
    assert math.isnan(again.limit)


def test_a_field_whose_type_names_no_class_says_which_one() -> None:
    plain = to_plain(Outer(shape=Square()))
    assert plain["shape"]["kind"].endswith(":Square")
    assert "kind" not in plain["inner"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 1.5}, "count is 1.5, but must be a valid integer"),
        ({"count": True}, "count is True, but must be a valid integer"),
        ({"count": "3"}, "count is '3', but must be a valid integer"),
        ({"on": 1}, "on is 1, but must be a valid boolean"),
        ({"path": 1}, "path is 1, but must be a valid string"),
        ({"mode": "medium"}, "mode is 'medium', but must be 'slow' or 'fast'"),
        ({"inner": {"rates": ["x"]}}, r"inner.rates\[0\] is 'x', but must be a valid number"),
        ({"inner": {"pair": [1]}}, r"inner.pair\[1\] is missing"),
        ({"inner": {"rate": 1}}, "unknown field 'inner.rate'; correct its name or remove it"),
        ({"inner": 5}, "inner is 5, but must be an object"),
        ({"count": "x", "on": "x"}, r"on is 'x', but .* boolean \(and 1 more\)"),
        ({"mode": "a" * 500}, r"mode is 'a{70,80}\.\.\., but must be"),
        ({"shape": 5}, "shape: '5' must be an object with kind 'module:class'"),
        ({"shape": {"side": 1}}, "must be an object with kind 'module:class'"),
        ({"shape": {"kind": "no.such:Thing"}}, "'no.such' is not imported; if it is yours"),
        ({"shape": {"kind": "fedl2p.no:Thing"}}, "there is no class 'fedl2p.no:Thing'"),
        ({"shape": {"kind": "pathlib:Thing"}}, "there is no class 'pathlib:Thing'"),
        ({"shape": {"kind": "pathlib:Path"}}, "is not a dataclass"),
        ({"shape": {"kind": f"{__name__}:Square", "side": -1}}, "^shape: side is -1.0, but must"),
        ({"shape": {"kind": f"{__name__}:Square", "sides": 1}}, "unknown field 'shape.sides'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str) -> None:
    plain = to_plain(Outer(shape=Square())) | change
    with pytest.raises(ValueError, match=said) as caught:
        from_plain(Outer, plain)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(ValueError, match="shape is missing"):
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
    @dataclass
    class Odd:
        shape: Shape

    with pytest.raises(ValueError, match="a field of Odd has no JSON form"):
        to_plain(Odd(Square()))
    with pytest.raises(ValueError, match="a setting of type object has no JSON form"):
        to_plain(Outer(shape=Square(), limit=object()))  # type: ignore[arg-type]


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outer = Outer(shape=Square(), path=Path("a/b"))
    assert with_absolute_paths(outer) == Outer(shape=Square(), path=tmp_path / "a" / "b")
    assert with_absolute_paths(Outer(shape=Square())) == Outer(shape=Square())


def test_a_study_needs_neither_torch_nor_pydantic_to_be_described() -> None:
    code = (
        "import sys, typing\n"
        "from fedl2p.study.settings import Study\n"
        "typing.get_type_hints(Study)\n"
        "found = {'torch', 'numpy', 'safetensors', 'pydantic', 'flwr', 'ray'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_runs_are_described_and_read_without_the_extra_until_a_file_is() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(pydantic=None, filelock=None)\n"
        "import fedl2p.runs.folder, fedl2p.runs.reading, fedl2p.study.settings\n"
        "fedl2p.study.settings.Study(data=None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_pydantic_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class New:
        count: int = 1

    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedl2p\[runs\]'"):
        to_plain(New())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("learn", {"rounds": "20"}, "learn.rounds is '20', but must be a valid integer"),
        ("lern", {}, "unknown field 'lern'"),
        ("engine", "spark", "engine is 'spark', but must be 'in-process' or 'ray'"),
        ("learn", {"rounds": -1}, "learn: rounds is -1, but must be 0 or more"),
        ("data", {"kind": "elsewhere:Data"}, "data: 'elsewhere:Data' is outside this package"),
        ("methods", ["elsewhere:method"], "'elsewhere' is not imported"),
    ],
)
def test_config_json_is_refused_in_one_line_with_its_name(
    field: str, value: object, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    plain = {"data": {"kind": "fedl2p.data.digits:Digits"}}
    path.write_text(json.dumps({**plain, field: value}))
    with pytest.raises(ValueError, match=said) as caught:
        Study.load(tmp_path)
    assert str(caught.value).startswith(f"{path} does not describe a study: ")
    assert "\n" not in str(caught.value)


def test_reading_settings_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_settings.py").write_text("raise SystemExit('this code has run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = to_plain(Outer(shape=Square())) | {"shape": {"kind": "hostile_settings:Thing"}}
    with pytest.raises(ValueError, match="'hostile_settings' is not imported"):
        from_plain(Outer, plain)
