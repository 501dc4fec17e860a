"""Malformed settings: every one ends in a named error of one line, at the command line too."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedl2p import recipes
from fedl2p.core.settings import HypergradientConfig, InnerLoop, MetaNetsConfig
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import Baselines, LocalTraining, MetaLearning, Settings
from fedl2p.runs.validation import from_plain, to_plain
from fedl2p.study.settings import Study
from support.fuzzing import ODD, as_json, changed, ends_well, fingerprint, fuzz, refused

pytestmark = pytest.mark.slow

SMOKE = to_plain(recipes.get("smoke"))


KINDS = [
    Rounds,
    MetaNetsConfig,
    InnerLoop,
    HypergradientConfig,
    LocalTraining,
    MetaLearning,
    Baselines,
    Settings,
]


@fuzz(300)
@given(plain=changed(SMOKE))
def test_settings_from_json(plain: Any) -> None:
    with ends_well("settings from JSON"):
        study = from_plain(Study, plain)
        # What passes is a study: it survives being written and read.
        again = from_plain(Study, json.loads(json.dumps(to_plain(study))))
        assert to_plain(again) == to_plain(study) or "nan" in repr(study)


@fuzz(200)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_numbers_in_settings(data: st.DataObject, kind: type) -> None:
    fields = [f.name for f in dataclasses.fields(kind) if type(f.default) in (int, float)]
    name = data.draw(st.sampled_from(fields))
    value = data.draw(st.floats() | st.integers())
    with ends_well("numbers in settings"):
        made = kind(**{name: value})
        assert not math.isnan(getattr(made, name)), f"{name} took NaN"


@fuzz(150)
@given(plain=changed(SMOKE), junk=st.none() | st.binary(max_size=40))
def test_config_files(plain: Any, junk: bytes | None, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_bytes(as_json(plain) if junk is None else junk)
    before = fingerprint(folder)
    with ends_well("config.json"):
        Study.load(folder)
    assert fingerprint(folder) == before


def flags(plain: Any, at: str = "") -> list[str]:
    """The command's options for all fields of a study."""
    if not isinstance(plain, dict):
        return [f"--{at}".replace("_", "-")]
    return [f for k, v in plain.items() if k != "kind" for f in flags(v, f"{at}.{k}" if at else k)]


FLAGS = [flag for flag in flags(SMOKE) if flag not in ("--recipe", "--model")]
WORDS = st.one_of(
    ODD.map(str),
    st.text(max_size=12),
    st.sampled_from(FLAGS),
    st.sampled_from(
        ["run", "smoke", "--help", "--", "-h", "--resume", "--out", "=", "-1", "1e400"]
    ),
)


@fuzz(80)
@given(data=st.data())
def test_fields_at_the_command_line(
    data: st.DataObject, smoke_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The folder holds a run, so that what is well-formed is refused too, at the very end.
    words = ["run", "smoke", "--out", str(smoke_run)]
    for _ in range(data.draw(st.integers(1, 3))):
        flag = data.draw(st.sampled_from(FLAGS))
        value = data.draw(WORDS)
        if value in ("-h", "--help") or _takes_long(flag, value):
            continue
        words += [flag, value]
    before = fingerprint(smoke_run)
    refused("command-line fields", capsys, *words)
    assert fingerprint(smoke_run) == before


def _takes_long(flag: str, value: str) -> bool:
    """Whether a field is right and means work: many clients of embedded data are made at once."""
    digits = value.strip().lstrip("+").replace("_", "")
    return flag.startswith("--data.") and digits.isdigit() and int(digits) > 50


@fuzz(100)
@given(words=st.lists(WORDS, max_size=4))
def test_any_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "report", "walk", "recipes", "run", "personalize"]
    if words and words[0] in ("-h", "--help"):
        return
    for name in command[:3]:
        if not any(w in ("-h", "--help") for w in words):
            refused("command lines", capsys, name, *words)
