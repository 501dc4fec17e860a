"""Recipes by name: functions that return a ready study, their variants, and users' own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec

from fedl2p import user_code
from fedl2p.study.settings import Study

P = ParamSpec("P")

_FUNCTIONS: dict[str, Callable[..., Study]] = {}

_VARIANTS = {
    "published": "as_published",
    "early_stopping": "early_stopping",
    "smoke": "smoke",
}
"""Endings of variants' names, in this order, and the argument of the function that each sets."""


def recipe(function: Callable[P, Study]) -> Callable[P, Study]:
    """Register a function as the recipe of its name, which the study then carries.

    A function with the arguments ``as_published``, ``early_stopping`` or ``smoke``, False by
    default, has variants under the names ``NAME_published``, ``NAME_smoke``,
    ``NAME_published_smoke`` and so on.
    """

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> Study:
        ends = (end for end, argument in _VARIANTS.items() if kwargs.get(argument))
        name = "_".join((function.__name__, *ends))
        return dataclasses.replace(function(*args, **kwargs), recipe=name)

    _FUNCTIONS[function.__name__] = named
    return named


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, or a variant of one; call it to get the study.

    Parameters
    ----------
    base
        Name without the variant's endings.
    function
        The recipe's function.
    sets
        Arguments of the function that the variant sets.
    """

    base: str
    function: Callable[..., Study]
    sets: Mapping[str, bool] = field(default_factory=dict)

    def __call__(self, **arguments: Any) -> Study:
        """Return the study; ``arguments`` go to the function."""
        return self.function(**arguments, **self.sets)


def names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted, without variants."""
    return tuple(sorted(_FUNCTIONS))


def describe(name: str) -> str:
    """Return the first line of the docstring of a recipe's file."""
    return (inspect.getdoc(inspect.getmodule(_FUNCTIONS[name])) or "").partition("\n")[0]


def variants(name: str) -> dict[str, dict[str, bool]]:
    """Return the variants of a recipe by name, with what each sets; the recipe itself first."""
    takes = inspect.signature(_FUNCTIONS[name]).parameters
    ends = [end for end, argument in _VARIANTS.items() if argument in takes]
    chosen = [c for n in range(len(ends) + 1) for c in itertools.combinations(ends, n)]
    return {"_".join((name, *c)): {_VARIANTS[end]: True for end in c} for c in chosen}


def find(name: str) -> Recipe:
    """Return the recipe of a name.

    Parameters
    ----------
    name
        Of a recipe, of a variant, or ``package.module:callable``.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    if user_code.is_user_code(name):
        return Recipe(base=name, function=functools.partial(_users, name))
    for base in names():
        if name in (known := variants(base)):
            return Recipe(base=base, function=_FUNCTIONS[base], sets=known[name])
    raise ValueError(
        f"unknown recipe {name!r}; there are {', '.join(names())}, the variants that `fedl2p "
        "recipes` lists, and your own as package.module:callable"
    )


def get(name: str) -> Study:
    """Return the study of a recipe.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    return find(name)()


def _users(name: str, **arguments: Any) -> Study:
    """Return the study of a user's recipe, under the recipe's name."""
    wanted = "a function without arguments that returns a fedl2p.Study"
    study = user_code.find_callable(name, what="recipe", wanted=wanted)(**arguments)
    if not isinstance(study, Study):
        raise ValueError(f"recipe {name!r} returned {type(study).__name__}; name {wanted}")
    return dataclasses.replace(study, recipe=name)
