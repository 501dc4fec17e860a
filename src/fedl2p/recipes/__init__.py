"""Recipes: functions that return a ready study. A recipe is a file of this folder.

Each file holds a function ``recipe() -> Study``; its file name is the recipe's name and the first
line of the file's docstring its description. A variant calls another recipe and changes fields with
``dataclasses.replace``. From Python a recipe is called by its name, with what its function takes:
``recipes.huggingface(dataset="...")``.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any, cast

from fedl2p.study import Study


def names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


class Recipe(ModuleType):
    """The file of a recipe, which is called like its function."""

    def __call__(self, **settings: Any) -> Study:
        """Return the study, under the recipe's name; ``settings`` go to its function."""
        study: Study = self.recipe(**settings)
        return dataclasses.replace(study, recipe=self.__name__.rpartition(".")[2])


def __getattr__(name: str) -> Recipe:
    if name in names():
        return _module(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get(name: str) -> Study:
    """Return the study of a recipe.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    return _module(name)()


def describe(name: str) -> str:
    """Return what a recipe is, in one line."""
    return (_module(name).__doc__ or "").strip().partition("\n")[0]


def _module(name: str) -> Recipe:
    if name not in names():
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(names())}")
    module = import_module(f"{__name__}.{name}")
    module.__class__ = Recipe
    return cast(Recipe, module)
