"""The methods by name. Every published method is one file of this folder; ``base/`` is shared code.

A file holds a subclass of :class:`fedl2p.method.Method` and a dictionary ``METHODS`` from the names
that a study may use to functions ``settings -> method``. To add a method, write such a file and
list it below; or write a function ``settings -> method`` outside this package and name it as
``package.module:callable``. Names are listed here so that they are known without importing torch.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING

from fedl2p import user_code
from fedl2p.methods.base.settings import Settings

if TYPE_CHECKING:
    from fedl2p.method import Method

PRETRAINING = "fedavg"
"""The method that trains the global model."""

METANETS = "fedl2p"
"""The method whose meta-nets a run keeps for later clients."""

AUDITED = ("fedavg", "bestfixed", "fedl2p-constant", "gridsearch", "fedl2p")
"""The methods of an audit: the global model, one setting for all, searched and learned, a search
per client, and FedL2P."""

_FILES = {
    "apfl": ("apfl",),
    "ditto": ("ditto",),
    "fedavg": ("fedavg",),
    "fedbabu": ("fedbabu",),
    "fedbn": ("fedbn", "fedbn-finetuning"),
    "fedl2p": ("fedl2p", "fedl2p-constant"),
    "fedper": ("fedper",),
    "fedprox": ("fedprox", "fedprox-finetuning"),
    "fedrep": ("fedrep",),
    "finetuning": (
        *("finetuning-global", "finetuning-half", "finetuning-client"),
        *("finetuning-head", "finetuning-norms"),
    ),
    "gridsearch": ("gridsearch", "bestfixed"),
    "l2p": ("l2p",),
    "local": ("local",),
    "perfedavg": ("perfedavg", "perfedavg-hf"),
}
"""The methods of each file, as in its ``METHODS``."""

_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    return tuple(sorted(_FILE_OF))


def title(name: str, settings: Settings) -> str:
    """Return the name of a method in reports: for a user's method, its attribute ``name``.

    Raises
    ------
    ValueError
        If there is no such method, or it cannot be used.
    """
    if user_code.is_user_code(name):
        return build(name, settings).name
    if name not in _FILE_OF:
        raise _unknown(name)
    return name


def build(name: str, settings: Settings) -> Method:
    """Build a method by name, or by ``package.module:callable``, which must be imported already.

    Raises
    ------
    ValueError
        If there is no such method, or it cannot be used.
    """
    if user_code.is_user_code(name):
        return _users(name, settings)
    if name not in _FILE_OF:
        raise _unknown(name)
    method: Method = import_module(f"{__name__}.{_FILE_OF[name]}").METHODS[name](settings)
    return method


def _users(name: str, settings: Settings) -> Method:
    """Build a user's method. Its ``name`` must be new and must serve as a file's name."""
    from fedl2p.method import Method

    wanted = "a function of the settings that returns a fedl2p.Method"
    built = user_code.find_callable(name, what="method", wanted=wanted, takes=(settings,))(settings)
    if not isinstance(built, Method):
        raise ValueError(f"method {name!r} returned {type(built).__name__}; name {wanted}")
    if built.name in (*_FILE_OF, "pretrain", "learn", "outcomes"):
        raise ValueError(f"method {name!r} is called {built.name!r}, which is taken; rename it")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", built.name):
        raise ValueError(
            f"method {name!r} is called {built.name!r}; its name serves for files too, so use "
            "letters, digits, '.', '_' and '-' only"
        )
    return built


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"there is no method {name!r}; there are {', '.join(names())}, and your own as "
        "package.module:callable"
    )
