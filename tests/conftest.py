"""Shared settings of the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)
# A GPU's convolutions compute in TF32 otherwise, which is too coarse for numbers of float32.
torch.backends.cudnn.allow_tf32 = False
# Measurements of other runs have no say in the tests, nor theirs in other runs.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fedl2p-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one finished run of the recipe smoke; not to be changed."""
    from fedl2p import recipes
    from fedl2p.study.run import run_study

    out = tmp_path_factory.mktemp("smoke") / "run"
    run_study(recipes.get("smoke"), out)
    return out
