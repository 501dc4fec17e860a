"""FedL2P: learn, across clients, how each client should fine-tune a model.

The names below are the public API. Each is imported on first use, so that the command line answers
``--help`` without torch, and personalizing one's own model needs no more than torch, numpy and
safetensors.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from fedl2p.version import __version__

if TYPE_CHECKING:
    from fedl2p.core.clientdata import ClientData, Examples
    from fedl2p.core.finetuning.inner_loop import finetune
    from fedl2p.core.hypergradients.estimators import hypergradient
    from fedl2p.core.hyperparams import Hyperparams
    from fedl2p.core.metanets import MetaNets
    from fedl2p.core.personalization import Personalized, personalize
    from fedl2p.core.profiles import Profile, profile
    from fedl2p.core.settings import HypergradientConfig, InnerLoop, MetaNetsConfig
    from fedl2p.core.sites import Sites, find_sites
    from fedl2p.data.population import Population
    from fedl2p.federation.rounds import federate
    from fedl2p.federation.settings import Rounds
    from fedl2p.method import Client, Method, Outcome, Update
    from fedl2p.methods.base.settings import MetaLearning, Settings
    from fedl2p.runs.results import Report
    from fedl2p.study.learn import learn
    from fedl2p.study.run import run_study
    from fedl2p.study.settings import Study

# The package logs under its own name and leaves it to the application what is shown.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_MODULES = {
    "fedl2p.core.clientdata": ("ClientData", "Examples"),
    "fedl2p.core.finetuning.inner_loop": ("finetune",),
    "fedl2p.core.hypergradients.estimators": ("hypergradient",),
    "fedl2p.core.hyperparams": ("Hyperparams",),
    "fedl2p.core.metanets": ("MetaNets",),
    "fedl2p.core.personalization": ("Personalized", "personalize"),
    "fedl2p.core.profiles": ("Profile", "profile"),
    "fedl2p.core.settings": ("HypergradientConfig", "InnerLoop", "MetaNetsConfig"),
    "fedl2p.core.sites": ("Sites", "find_sites"),
    "fedl2p.data.population": ("Population",),
    "fedl2p.federation.rounds": ("federate",),
    "fedl2p.federation.settings": ("Rounds",),
    "fedl2p.method": ("Client", "Method", "Outcome", "Update"),
    "fedl2p.methods.base.settings": ("MetaLearning", "Settings"),
    "fedl2p.runs.results": ("Report",),
    "fedl2p.study.learn": ("learn",),
    "fedl2p.study.run": ("run_study",),
    "fedl2p.study.settings": ("Study",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Client",
    "ClientData",
    "Examples",
    "HypergradientConfig",
    "Hyperparams",
    "InnerLoop",
    "MetaLearning",
    "MetaNets",
    "MetaNetsConfig",
    "Method",
    "Outcome",
    "Personalized",
    "Population",
    "Profile",
    "Report",
    "Rounds",
    "Settings",
    "Sites",
    "Study",
    "Update",
    "__version__",
    "federate",
    "find_sites",
    "finetune",
    "hypergradient",
    "learn",
    "personalize",
    "profile",
    "run_study",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
