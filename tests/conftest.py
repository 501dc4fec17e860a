"""Shared settings of the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one finished run of the recipe smoke; not to be changed."""
    from fedl2p import recipes
    from fedl2p.study.run import run_study

    out = tmp_path_factory.mktemp("smoke") / "run"
    run_study(recipes.get("smoke"), out)
    return out
