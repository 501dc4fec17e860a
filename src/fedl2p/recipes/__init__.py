"""Recipes: functions that return a ready study. A recipe is a file of this folder.

Each file holds a function ``recipe() -> Study``; its file name is the recipe's name and the first
line of the file's docstring its description. A variant calls another recipe and changes fields with
``dataclasses.replace``. From Python a recipe is called by its name, with what its function takes:
``recipes.huggingface(dataset="...")``.

A function may also take ``as_published`` and ``smoke``, both False by default: then
``NAME_published``, ``NAME_smoke`` and ``NAME_published_smoke`` are recipes too. Files whose names
begin with an underscore are no recipes. A function ``() -> Study`` outside this package is a recipe
under the name ``package.module:callable``.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import pkgutil
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, cast

from fedl2p import user_code
from fedl2p.study.settings import Study

VARIANTS = {"published": "as_published", "smoke": "smoke"}
"""What may end a recipe's name, in this order, and the argument of its function that this sets."""


def names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted, without variants."""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in files if not name.startswith("_")))


def variants(name: str) -> dict[str, dict[str, bool]]:
    """Return the variants of a recipe by name, with what each sets; the recipe itself first."""
    takes = inspect.signature(_module(name).recipe).parameters
    ends = [end for end, argument in VARIANTS.items() if argument in takes]
    chosen = [c for n in range(len(ends) + 1) for c in itertools.combinations(ends, n)]
    return {"_".join((name, *c)): {VARIANTS[end]: True for end in c} for c in chosen}


def find(name: str) -> tuple[Recipe | OwnRecipe, dict[str, bool]]:
    """Return a recipe, which is called like its function, and what its name sets as a variant's.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    if user_code.is_user_code(name):
        return OwnRecipe(name), {}
    for base in names():
        if name == base or name.startswith(f"{base}_"):
            known = variants(base)
            if name in known:
                return _module(base), known[name]
    raise ValueError(
        f"unknown recipe {name!r}; there are {', '.join(names())}, of those of the paper "
        "NAME_published and NAME_smoke, and your own as package.module:callable"
    )


class Recipe(ModuleType):
    """The file of a recipe, which is called like its function."""

    def __call__(self, **settings: Any) -> Study:
        """Return the study, under the recipe's name; ``settings`` go to its function."""
        study: Study = self.recipe(**settings)
        ends = [end for end, argument in VARIANTS.items() if settings.get(argument)]
        return dataclasses.replace(study, recipe="_".join((self.title, *ends)))

    @property
    def title(self) -> str:
        """The recipe's name."""
        return self.__name__.rpartition(".")[2]


@dataclass(frozen=True)
class OwnRecipe:
    """A user's recipe.

    Parameters
    ----------
    title
        Its name, ``package.module:callable``.
    """

    title: str

    def __call__(self, **settings: Any) -> Study:
        """Return the study, under the recipe's name; ``settings`` go to the function."""
        wanted = "a function without arguments that returns a fedl2p.Study"
        study = user_code.find_callable(self.title, what="recipe", wanted=wanted)(**settings)
        if not isinstance(study, Study):
            raise ValueError(
                f"recipe {self.title!r} returned {type(study).__name__}; name {wanted}"
            )
        return dataclasses.replace(study, recipe=self.title)


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
    recipe, sets = find(name)
    return recipe(**sets)


def describe(name: str) -> str:
    """Return what a recipe is, in one line."""
    return (_module(name).__doc__ or "").strip().partition("\n")[0]


def _module(name: str) -> Recipe:
    module = import_module(f"{__name__}.{name}")
    module.__class__ = Recipe
    return cast(Recipe, module)
