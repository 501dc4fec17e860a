"""Stacks here do not depend on the machine, so that what is tested on a stack runs on one."""

from __future__ import annotations

import pytest

from fedl2p.core.finetuning import stacking


@pytest.fixture(autouse=True)
def stacks_of_three_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "fewest_clients", lambda net, x, size: stacking.FEWEST)
