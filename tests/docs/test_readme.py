"""The README's lines of Python run as printed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedl2p

README = Path(__file__).parents[2] / "README.md"


def block() -> str:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code, "the README has no Python block"
    return code.group(1)


def test_the_readmes_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block()
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    model, mine = names["model"], names["mine"].model
    assert type(mine[1]) is nn.BatchNorm1d
    restored = copy.deepcopy(model)
    restored.load_state_dict(torch.load("mine.pt", weights_only=True), strict=True)
    new = names["some_client"](200)
    assert torch.equal(restored.eval()(new.x), mine.eval()(new.x))
    before, after = (nn.functional.cross_entropy(m.eval()(new.x), new.y) for m in (model, mine))
    assert after < before - 0.3
    assert re.search(r"\{'1': 0\.\d+\}", capsys.readouterr().out)


def test_the_readme_is_read_in_a_minute() -> None:
    assert 450 <= len(README.read_text().split()) <= 700


def test_learn_refuses_clients_without_validation_part() -> None:
    data = fedl2p.ClientData(fedl2p.Examples(torch.randn(8, 4), torch.arange(8) % 3))
    with pytest.raises(ValueError, match=r"'a'.*validation"):
        fedl2p.learn(nn.Linear(4, 3), {"a": data})


def test_every_command_of_the_readme_exists() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile
