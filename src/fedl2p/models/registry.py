"""Build a model by name: ``package.module:callable``.

The callable takes the shape of one example and the number of classes and returns a
``torch.nn.Module``. It needs nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedl2p import user_code
from fedl2p.seeds import derive_seed

Builder = Callable[[Sequence[int], int], nn.Module]
"""``builder(shape, classes) -> module``; ``shape`` is that of one example, without the batch."""


def is_ours(spec: str) -> bool:
    """Tell whether a model is one of this package.

    To build another one is to run code that somebody named. A user may name it; a file that came
    from elsewhere may not.
    """
    return spec.partition(":")[0] == "fedl2p.models"


def load(spec: str, *, shape: Sequence[int], classes: int) -> nn.Module:
    """Return a model by name; its weights come from torch's global generator.

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
    module, _, name = spec.partition(":")
    if not (module and name):
        raise ValueError(
            f"model {spec!r} is not of the form package.module:callable, "
            "e.g. fedl2p.models:small_conv"
        )
    user_code.import_user_module(spec, what="model", from_working_directory=False)
    wanted = "a function of (shape, classes) that returns a torch.nn.Module"
    given = tuple(shape), classes
    model = user_code.find_callable(spec, what="model", wanted=wanted, takes=given)(*given)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r} returned {type(model).__name__}; name {wanted}")
    return model


def build(spec: str, *, shape: Sequence[int], classes: int, seed: int) -> nn.Module:
    """Do as :func:`load`, with initial weights that depend on the seed alone.

    Modules draw their initial weights from torch's global CPU generator; it is seeded for this
    call and restored afterwards. Parameters as in :func:`load`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "model"))
        return load(spec, shape=shape, classes=classes)
