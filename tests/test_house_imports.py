"""The arrows between the rooms point one way, and importing the package stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fedl2p

SRC = Path(fedl2p.__file__).parent

# What the main job is put together from.
_BELOW = {"seeds", "core", "method", "methods", "data", "models", "federation", "reporting"}

# room -> rooms it may import. A room is a folder or a top-level file of the package.
ARROWS: dict[str, set[str]] = {
    "seeds": set(),
    "durable": set(),
    "config": set(),
    "core": {"seeds", "durable"},
    "plugins": set(),
    "method": {"core"},
    "methods": {"method", "core", "seeds", "plugins"},
    "data": {"core", "seeds"},
    "resnets": set(),
    "models": {"core", "resnets", "seeds"},
    "federation": {"method", "data", "models", "core", "seeds", "durable"},
    "reporting": {"method", "core", "durable"},
    "rundir": {"config", "durable", "data", "reporting"},
    "engines": {"method", "methods", "models", "data", "federation", "study", "core"},
    "stages": {
        *(*_BELOW, "engines", "resnets", "rundir", "durable", "spending"),
        "study",  # for its type alone
    },
    "spending": {"federation", "reporting"},
    "study": {*_BELOW, "config", "rundir", "stages"},
    "newclient": {
        *("core", "data", "durable", "engines", "method", "models", "reporting", "rundir"),
        "study",
    },
    "explaining": {"core", "data", "engines", "newclient", "reporting", "study"},
    "learning": {"core", "data", "federation", "methods"},
    "recipes": {"study", "data", "methods", "federation", "core", "models", "plugins"},
    "runconfig": {"config", "recipes", "study"},
    "node": {*_BELOW, "durable", "engines", "newclient", "rundir", "study"},
    "serving": {*_BELOW, "config", "newclient", "runconfig", "study"},
    "app": {*_BELOW, "config", "engines", "node", "rundir", "runconfig", "serving", "study"},
    "commandline": set(),
    "datacommand": {"commandline", "data"},
    "tables": {"federation", "recipes", "reporting", "rundir", "stages", "study"},
    "tablecommand": {"commandline", "federation", "plugins", "recipes", "study", "tables"},
    "cli": {
        "plugins",
        "commandline",
        "datacommand",
        "tablecommand",
        "models",
        "study",
        "newclient",
        "explaining",
        "federation",
        "recipes",
        "reporting",
    },
    "__init__": {"core", "method", "federation", "learning", "study"},
}

# room -> packages outside the standard library that it may import.
PACKAGES: dict[str, set[str]] = {
    "seeds": {"torch"},
    "durable": {"torch", "safetensors"},
    "core": {"torch", "safetensors"},
    "method": {"torch"},
    "methods": {"torch"},
    "data": {
        "torch",
        "numpy",
        "sklearn",
        "PIL",
        "requests",
        "filelock",
        "datasets",
        "flwr_datasets",
        "scipy",
        "soundfile",
    },
    "resnets": {"torch"},
    "models": {"torch"},
    "federation": {
        *("torch", "numpy", "safetensors", "flwr", "ray", "rich", "tensorboard"),
        "dp_accounting",
    },
    "reporting": {"torch", "numpy", "jinja2", "markupsafe"},
    "plugins": set(),
    "config": set(),
    "rundir": {"torch", "safetensors"},
    "engines": {"torch"},
    "spending": set(),
    "stages": {"torch"},
    "study": set(),
    "newclient": {"torch"},
    "explaining": {"torch"},
    "runconfig": set(),
    "node": {"torch"},
    "serving": set(),
    "learning": {"torch"},
    "recipes": set(),
    "app": {"torch", "flwr"},
    "commandline": {"tyro"},
    "datacommand": {"rich"},
    "tables": set(),
    "tablecommand": set(),
    "cli": {"tyro"},
    "__init__": set(),
}


def room_of(file: Path) -> str:
    return file.relative_to(SRC).parts[0].removesuffix(".py")


def imported_modules(source: str) -> list[str]:
    """Names of all modules imported anywhere in a file, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            if node.module == "fedl2p":
                names += [f"fedl2p.{alias.name}" for alias in node.names]
            else:
                names.append(node.module or "")
    return names


def forbidden(room: str, source: str) -> list[str]:
    """The imports of a file that its room may not have."""
    bad = []
    for name in imported_modules(source):
        top, _, rest = name.partition(".")
        if top == "fedl2p":
            target = rest.partition(".")[0]
            if target not in {room, "__version__", *ARROWS[room]}:
                bad.append(name)
        elif top not in sys.stdlib_module_names and top not in PACKAGES[room]:
            bad.append(name)
    return bad


def files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(SRC)))
def test_imports_follow_the_arrows(file: Path) -> None:
    room = room_of(file)
    assert room in ARROWS, f"new room {room!r}: say in ARROWS and PACKAGES what it may import"
    assert forbidden(room, file.read_text()) == []


def test_the_rule_catches_a_wrong_arrow() -> None:
    assert forbidden("core", "def f():\n    from fedl2p.methods import fedavg") == [
        "fedl2p.methods"
    ]
    assert forbidden("core", "from fedl2p import cli") == ["fedl2p.cli"]
    assert forbidden("methods", "import flwr.app") == ["flwr.app"]
    assert forbidden("core", "import math, torch.nn\nfrom fedl2p.core import sites") == []


def test_nothing_imports_app_or_cli_and_only_federation_and_app_import_flwr() -> None:
    for room, targets in ARROWS.items():
        assert not targets & {"app", "cli"}, room
        assert ("flwr" in PACKAGES[room]) == (room in {"federation", "app"}), room


def test_no_file_is_named_like_a_function_it_exports() -> None:
    for file in files():
        tree = ast.parse(file.read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert file.stem not in functions, file


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SRC.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# None in sys.modules makes an import fail as if the package were not there.
WITHOUT_EXTRAS = """
    import sys
    for name in ("flwr", "ray", "sklearn", "rich", "tyro", "jinja2"):
        sys.modules[name] = None
"""


def test_the_package_works_without_any_extra() -> None:
    said = run_python(
        WITHOUT_EXTRAS
        + """
    import fedl2p
    public = [n for n in fedl2p.__all__ if n not in ("Study", "run_study", "federate", "learn")]
    assert all(getattr(fedl2p, name) is not None for name in public)
    try:
        fedl2p.run_study
    except ModuleNotFoundError as error:
        print("missing", error.name)
    """
    )
    assert said.startswith("missing flwr")


def test_public_names_resolve() -> None:
    pytest.importorskip("flwr")
    for name in fedl2p.__all__:
        assert getattr(fedl2p, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'personalise'"):
        _ = fedl2p.personalise  # type: ignore[attr-defined]


def test_import_costs_less_than_one_and_a_half_times_torch() -> None:
    code = """
        import time
        start = time.process_time()
        import {module}
        print(time.process_time() - start)
    """

    def best(module: str) -> float:
        return float(run_python(code.format(module=module)))

    # Interleaved and best of several: what another process does in between hits both alike.
    torch_s, fedl2p_s = float("inf"), float("inf")
    for _ in range(5):
        torch_s, fedl2p_s = min(torch_s, best("torch")), min(fedl2p_s, best("fedl2p"))
        if fedl2p_s < 1.3 * torch_s:
            break
    assert fedl2p_s < 1.5 * torch_s, (
        f"import fedl2p took {fedl2p_s:.2f} s, torch alone {torch_s:.2f} s"
    )
