"""Nothing in the package can execute what a file or a message says."""

from __future__ import annotations

import ast
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedl2p
from fedl2p import models
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.new_client import load_run, personalize_new_client

ROOT = Path(fedl2p.__file__).parent
REPOSITORY = Path(__file__).parents[2]

# What reads more than data. Only a class derived from pickle.Unpickler may admit single names.
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE = {
    ("yaml", "load"): "yaml.safe_load reads data only",
    ("yaml", "unsafe_load"): "yaml.safe_load reads data only",
    ("pickle", "load"): "only a class derived from pickle.Unpickler that admits names one by one",
    ("pickle", "loads"): "only a class derived from pickle.Unpickler that admits names one by one",
    ("os", "system"): "no shell",
    ("os", "popen"): "no shell",
}
# An Unpickler of one's own that overrides find_class is the one way to read a foreign pickle.
RESTRICTED = {"pickle"}


def unsafe(source: str) -> list[str]:
    """What a file must not do, one line each."""
    tree = ast.parse(source)
    bad = []
    restricted = any(_restricts(node) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # an exception to catch reads nothing
            harmless = [alias.name for alias in node.names] == ["UnpicklingError"]
            names = [] if harmless else [node.module or ""]
        else:
            names = []
        for name in names:
            top = name.partition(".")[0]
            if top in MODULES and not (top in RESTRICTED and restricted):
                bad.append(f"line {node.lineno}: imports {name}")
        if isinstance(node, ast.Call):
            bad += [f"line {node.lineno}: {why}" for why in _unsafe_call(node)]
    return bad


def _restricts(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("Unpickler") for base in node.bases)
        and any(isinstance(f, ast.FunctionDef) and f.name == "find_class" for f in node.body)
    )


def _unsafe_call(call: ast.Call) -> list[str]:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if isinstance(call.func, ast.Name) and call.func.id in CALLS:
        return [f"calls {call.func.id}"]
    if not isinstance(call.func, ast.Attribute):
        return []
    owner, name = ast.unparse(call.func.value), call.func.attr
    if (owner, name) in UNSAFE:
        return [f"calls {owner}.{name}: {UNSAFE[owner, name]}"]
    if (owner, name) == ("torch", "load") and given.get("weights_only") != "True":
        return ["calls torch.load without weights_only=True"]
    if owner in ("np", "numpy") and name == "load" and given.get("allow_pickle") != "False":
        return ["calls numpy.load without allow_pickle=False"]
    if given.get("shell") == "True":
        return [f"calls {owner}.{name} with shell=True"]
    return []


@pytest.mark.parametrize(
    "file",
    [
        *sorted(ROOT.rglob("*.py")),
        *(f for d in ("benchmarks", "examples") for f in sorted((REPOSITORY / d).rglob("*.py"))),
    ],
    ids=lambda path: path.stem,
)
def test_no_file_can_execute_what_it_reads(file: Path) -> None:
    assert unsafe(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib",
        "from pickle import loads",
        "import pickle\nclass A(pickle.Unpickler):\n    pass",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f)",
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_the_check_finds_it(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "model.eval()",
        "import re\nre.compile('x')",
        "import pickle\nclass A(pickle.Unpickler):\n    def find_class(self, m, n): raise E",
    ],
)
def test_the_check_lets_the_safe_form_pass(source: str) -> None:
    assert unsafe(source) == []


class Bomb:
    """Executes code when it is unpickled: writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.slow
def test_pickles_are_refused_wherever_a_file_is_read(tmp_path: Path, smoke_run: Path) -> None:
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it works where somebody is careless
    mark.unlink()
    client = tmp_path / "client.npz"
    objects = np.array([Bomb(mark)], dtype=object)
    np.savez(client, x_train=objects, y_train=np.zeros(1, int))
    with pytest.raises(ValueError, match=r"client\.npz: not a readable \.npz file of plain arrays"):
        personalize_new_client(smoke_run, client, tmp_path / "out")
    weights = tmp_path / "weights.safetensors"
    for write in (
        lambda: torch.save({"w": Bomb(mark)}, weights),
        lambda: weights.write_bytes(pickle.dumps(Bomb(mark))),
        lambda: np.save(weights.open("wb"), objects),
    ):
        write()
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            load_tensors(weights)
    assert not mark.exists()


@pytest.fixture
def hostile_run(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose config.json asks for code that lies in the user's folder."""
    for name in ("config.json", "population.json", "global.safetensors"):
        (tmp_path / name).write_bytes((smoke_run / name).read_bytes())
    for name in ("metanets.json", "metanets.safetensors"):
        (tmp_path / name).write_bytes((smoke_run / name).read_bytes())
    (tmp_path / "hostile.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\n"
        "from fedl2p.models import small_conv as build\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile", raising=False)
    change(tmp_path, model="hostile:build")
    return tmp_path


def change(run: Path, **fields: object) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_run_folder_cannot_name_the_code_that_is_run(hostile_run: Path) -> None:
    with pytest.raises(ValueError, match=r"code outside this package; .*: --model hostile:build"):
        load_run(hostile_run)
    with pytest.raises(ValueError, match="code outside this package"):
        load_run(hostile_run, model="hostile:other")
    change(hostile_run, model="subprocess:call")
    with pytest.raises(ValueError, match="code outside this package"):
        load_run(hostile_run)
    assert not (hostile_run / "executed").exists()
    # Whoever names it has said that it is theirs.
    change(hostile_run, model="hostile:build")
    load_run(hostile_run, model="hostile:build")
    assert (hostile_run / "executed").exists()


def test_a_run_folder_cannot_name_the_class_of_its_data(hostile_run: Path) -> None:
    config = json.loads((hostile_run / "config.json").read_text())
    change(
        hostile_run, model="fedl2p.models:small_conv", data={**config["data"], "kind": "hostile:X"}
    )
    with pytest.raises(ValueError, match="'hostile:X' is outside this package"):
        load_run(hostile_run)
    assert not (hostile_run / "executed").exists()


def test_which_models_are_ours() -> None:
    assert models.is_ours("fedl2p.models:small_conv")
    for foreign in (
        "subprocess:call",
        "fedl2p.cli:main",
        "fedl2p.models.registry.x:y",
        "",
        "fedl2p",
        ":",
    ):
        assert not models.is_ours(foreign)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", ["rm", "-rf"]),
        ("shape", [10**9, 8, 8]),
        ("shape", [0, 8, 8]),
        ("shape", [True, 8, 8]),
        ("shape", None),
        ("classes", 10**12),
        ("classes", -1),
        ("classes", "10"),
        ("classes", 1.5),
    ],
)
def test_sizes_that_a_folder_claims_are_bounded(
    field: str, value: object, hostile_run: Path
) -> None:
    change(hostile_run, model="fedl2p.models:small_conv")
    world = json.loads((hostile_run / "population.json").read_text())
    (hostile_run / "population.json").write_text(json.dumps({**world, field: value}))
    with pytest.raises(ValueError, match=rf"population\.json is damaged: {field}(\[0\])? is"):
        load_run(hostile_run)
