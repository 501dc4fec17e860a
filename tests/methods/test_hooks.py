"""Nobody outside the methods knows one by name: what is special about one, it says by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fedl2p
from fedl2p import methods
from fedl2p.core.metanets import MetaNets
from fedl2p.methods.base.settings import Settings
from support.nets import nested_net

SOURCE = Path(fedl2p.__file__).parent
TABLES = ("methods", "recipes", "reporting")
"""Folders that may list methods: their own, what a recipe runs, and what a report calls them."""

NAMES = set(methods.names())

OTHER_WORDS = {"fedl2p", "fedavg", "local"}
"""Names of methods that are also the package's, a rule of aggregation, a kind of privacy."""


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the lines on which a method is named, and its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedl2p.methods."):
            module = str(node.module)
            if not module.startswith("fedl2p.methods.base"):
                yield node.lineno, module
        if isinstance(node, ast.Compare | ast.Call | ast.Dict | ast.Tuple | ast.Assign):
            words = [n.value for n in ast.iter_child_nodes(node) if isinstance(n, ast.Constant)]
            about = ast.unparse(node).lower()
            for word in OTHER_WORDS.intersection(w for w in words if isinstance(w, str)):
                if "method" in about or ".name" in about:
                    yield node.lineno, word
        if isinstance(node, ast.Constant) and node.value in NAMES - OTHER_WORDS:
            yield node.lineno, str(node.value)


def without_the_default(tree: ast.Module) -> ast.Module:
    """Leave out ``METHODS``, what a study runs unless it says otherwise."""
    tree.body = [
        n
        for n in tree.body
        if not (isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "METHODS")
    ]
    return tree


def test_no_method_is_known_by_name_outside_the_methods() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line} {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).parts[0] not in TABLES
        for line, name in named(without_the_default(ast.parse(path.read_text())))
    ]
    assert found == []


def test_what_methods_say_of_themselves() -> None:
    model = nested_net()
    built = [methods.build(name, Settings()) for name in methods.names()]
    assert [m.name for m in built if m.trained_by_pretraining] == [methods.PRETRAINING]
    stages = {m.name: m.stage for m in built}
    assert stages.pop(methods.METANETS) == "learn"
    assert all(stage == name for name, stage in stages.items())
    for method in built:
        state = method.start(model)
        nets = method.final_metanets(model, state)
        assert (nets is not None) == (method.name == methods.METANETS)
        if isinstance(nets, MetaNets):
            assert all((nets.state_dict()[k] == v).all() for k, v in state.items())
