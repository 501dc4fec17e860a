"""Models that the recipes train, and how a study names one.

A model is named ``package.module:callable``; the callable takes the shape of one example and the
number of classes and returns a ``torch.nn.Module``. Those here are of that kind; a user's
own needs nothing of this package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from fedl2p.seeds import derive_seed

Builder = Callable[[Sequence[int], int], nn.Module]
"""``builder(shape, classes) -> module``; ``shape`` is that of one example, without the batch."""


def is_ours(spec: str) -> bool:
    """Tell whether a model's name stays within this module.

    To build another one is to run code that somebody named. A user may name it; a file that came
    from elsewhere may not.
    """
    return spec.partition(":")[0] == "fedl2p.models"


def load(spec: str, *, shape: Sequence[int], classes: int) -> nn.Module:
    """Find a model by name and build it; its weights come from torch's global generator.

    Parameters
    ----------
    spec
        ``package.module:callable``, e.g. ``fedl2p.models:small_conv``.
    shape
        Shape of one example, without the batch.
    classes
        Number of classes.

    Returns
    -------
    nn.Module
        What the callable returned.

    Raises
    ------
    ValueError
        If the module or the callable cannot be found, or it does not return a module. What the
        callable itself raises is passed on.
    """
    model = _find(spec)(tuple(shape), classes)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {spec!r} returned {type(model).__name__}, not a torch.nn.Module; "
            "name a function of (shape, classes) that returns a module"
        )
    return model


def build(spec: str, *, shape: Sequence[int], classes: int, seed: int) -> nn.Module:
    """Do as :func:`load`, with initial weights that depend on the seed alone.

    Modules draw their initial weights from torch's global CPU generator; it is seeded for this
    call and left as it was found. Parameters as in :func:`load`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "model"))
        return load(spec, shape=shape, classes=classes)


def _find(spec: str) -> Builder:
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ValueError(
            f"model {spec!r} is not of the form package.module:callable, "
            "e.g. fedl2p.models:small_conv"
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError) as error:  # TypeError: a relative name such as '.models'
        raise ValueError(
            f"model {spec!r}: cannot import {module_name!r} ({error}); "
            "check the spelling and that it is installed or on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        what = "is not callable" if hasattr(module, name) else "does not exist"
        raise ValueError(
            f"model {spec!r}: {name!r} {what} in {module_name!r}; "
            "name a function of (shape, classes) that returns a torch.nn.Module"
        )
    _check_takes_two(spec, found)
    return cast(Builder, found)


def _check_takes_two(spec: str, found: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(found)
    except ValueError:  # some callables written in C do not tell
        return
    try:
        signature.bind((1, 8, 8), 10)
    except TypeError as error:
        raise ValueError(
            f"model {spec!r} cannot be called with (shape, classes): {error}; "
            "wrap it in a function that takes these two"
        ) from error
