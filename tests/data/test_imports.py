"""Importing a source, as the command line does for help, needs no torch and no heavy package."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import fedl2p
import fedl2p.data

SOURCES = sorted(
    module.name
    for module in pkgutil.walk_packages(fedl2p.data.__path__, "fedl2p.data.")
    if not module.ispkg
)

CODE = """
import sys
from types import ModuleType
sys.modules["torch"] = ModuleType("torch")  # has no attributes: every use fails
for name in ("sklearn", "scipy", "PIL", "requests", "datasets", "flwr_datasets", "pooch", "flwr"):
    sys.modules[name] = None
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_no_source_uses_torch_when_it_is_imported() -> None:
    assert {"fedl2p.data.digits", "fedl2p.data.cifar10", "fedl2p.data.speech"} <= set(SOURCES)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *SOURCES],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(fedl2p.__file__).parents[1]), "PATH": ""},
    )
    assert done.stderr == ""
