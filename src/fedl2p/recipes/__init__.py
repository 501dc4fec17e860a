"""Recipes: functions that return a ready study. A recipe is a file of this folder.

Each file holds a function ``recipe() -> Study``; its file name is the recipe's name and the first
line of the file's docstring its description. A variant calls another recipe and changes fields with
``dataclasses.replace``.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from importlib import import_module
from types import ModuleType

from fedl2p.study import Study


def names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> Study:
    """Return the study of a recipe.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    study: Study = _module(name).recipe()
    return dataclasses.replace(study, recipe=name)


def describe(name: str) -> str:
    """Return what a recipe is, in one line."""
    return (_module(name).__doc__ or "").strip().partition("\n")[0]


def _module(name: str) -> ModuleType:
    if name not in names():
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(names())}")
    return import_module(f"{__name__}.{name}")
