"""Stacks here do not depend on the machine, so that what is tested on a stack runs on one."""

from __future__ import annotations

import pytest

from fedl2p.core.finetuning import stacking


@pytest.fixture(autouse=True)
def stacks_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "stacks_pay", lambda net, x, size: True)
