"""FedL2P: learn, across clients, how each client should fine-tune a model.

The names below are the public API. Those that run a federation need the extra ``flower`` and are
imported on first use, so that personalizing one's own model needs torch alone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.inner_loop import InnerLoop, finetune
from fedl2p.core.hypergradients.estimators import hypergradient
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.personalization import Personalized, personalize
from fedl2p.core.profiles import Profile, profile
from fedl2p.core.sites import Sites, find_sites
from fedl2p.method import Client, Method, Outcome, Update

if TYPE_CHECKING:
    from fedl2p.federation.rounds import federate
    from fedl2p.study.learn import learn
    from fedl2p.study.run import run_study
    from fedl2p.study.settings import Study

__version__ = "0.1.0"

# The package logs under its own name and leaves it to the application what is shown.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "Client",
    "ClientData",
    "Examples",
    "Hyperparams",
    "InnerLoop",
    "MetaNets",
    "Method",
    "Outcome",
    "Personalized",
    "Profile",
    "Sites",
    "Study",
    "Update",
    "federate",
    "find_sites",
    "finetune",
    "hypergradient",
    "learn",
    "personalize",
    "profile",
    "run_study",
]

_LAZY = {
    "Study": "fedl2p.study.settings",
    "run_study": "fedl2p.study.settings",
    "federate": "fedl2p.federation.rounds",
    "learn": "fedl2p.study.learn",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
