"""The names of ``fedl2p``: enough for every public signature, and cheap to import."""

from __future__ import annotations

import collections.abc
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedl2p

NAMES = [name for name in fedl2p.__all__ if name != "__version__"]

EVALUATED = {
    **{name: getattr(typing, name) for name in typing.__all__},
    **{name: getattr(collections.abc, name) for name in collections.abc.__all__},
    **{name: getattr(fedl2p, name) for name in NAMES},
    **{"torch": torch, "nn": torch.nn, "Tensor": torch.Tensor, "np": np, "Path": Path},
    "Augment": typing.Callable,
}
"""What annotations name that a module imports for type checkers only."""


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes of a type hint, those within Optional, Sequence, Callable and so on too."""
    if isinstance(hint, type):
        yield hint
    for inner in typing.get_args(hint):
        for one in inner if isinstance(inner, list) else [inner]:
            yield from classes_in(one)


def functions_of(public: Any) -> Iterator[Any]:
    """Yield a function itself, or a class's constructor and public methods."""
    if not isinstance(public, type):
        yield public
        return
    for name, member in vars(public).items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            yield function


def parameter_types(public: Any) -> Iterator[type]:
    """Yield our own classes among the types of the parameters of a function or class."""
    for function in functions_of(public):
        hints = typing.get_type_hints(function, localns=EVALUATED)
        for name, hint in hints.items():
            if name != "return":
                yield from (c for c in classes_in(hint) if c.__module__.startswith("fedl2p"))


@pytest.mark.parametrize("name", NAMES)
def test_every_type_that_a_public_name_takes_is_public(name: str) -> None:
    public = {getattr(fedl2p, n) for n in NAMES}
    missing = {t.__qualname__ for t in parameter_types(getattr(fedl2p, name)) if t not in public}
    assert not missing, f"{name} takes what fedl2p.__all__ lacks"


def test_the_names_of_type_checkers_are_those_at_run_time() -> None:
    source = inspect.getsource(fedl2p)
    imported = {
        line.split()[-1] for line in source.splitlines() if line.startswith("    from fedl2p.")
    }
    assert imported == set(NAMES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Roundz'"):
        _ = fedl2p.Roundz
    assert set(NAMES) <= set(dir(fedl2p))


def test_importing_the_package_imports_no_other() -> None:
    code = "import sys, fedl2p; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(fedl2p.__file__).parents[1])},
    )
    assert not {"torch", "numpy", "flwr", "tyro", "rich", "pydantic"} & set(done.stdout.split())
