"""FedL2P: learn, across clients, how each client should fine-tune a model.

The names below are the public API: functions, and every type that they take. Each is imported on
first use, so that the command line prints help without torch, and personalizing a model needs no
more than torch, numpy and safetensors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedl2p.version import __version__ as __version__

if TYPE_CHECKING:
    from fedl2p import plot as plot
    from fedl2p.core.clientdata import ClientData as ClientData
    from fedl2p.core.clientdata import Examples as Examples
    from fedl2p.core.finetuning.inner_loop import finetune as finetune
    from fedl2p.core.hypergradients.estimators import hypergradient as hypergradient
    from fedl2p.core.hyperparams import Hyperparams as Hyperparams
    from fedl2p.core.metanets import MetaNets as MetaNets
    from fedl2p.core.personalization import Personalized as Personalized
    from fedl2p.core.personalization import personalize as personalize
    from fedl2p.core.profiles import Profile as Profile
    from fedl2p.core.profiles import profile as profile
    from fedl2p.core.settings import Compute as Compute
    from fedl2p.core.settings import HypergradientConfig as HypergradientConfig
    from fedl2p.core.settings import InnerLoop as InnerLoop
    from fedl2p.core.settings import MetaNetsConfig as MetaNetsConfig
    from fedl2p.core.sites import Sites as Sites
    from fedl2p.core.sites import find_sites as find_sites
    from fedl2p.data.population import Population as Population
    from fedl2p.federation.listeners import Listener as Listener
    from fedl2p.federation.messages import Answer as Answer
    from fedl2p.federation.messages import Clients as Clients
    from fedl2p.federation.messages import FederationError as FederationError
    from fedl2p.federation.messages import FrozenModel as FrozenModel
    from fedl2p.federation.messages import Question as Question
    from fedl2p.federation.privacy.settings import Privacy as Privacy
    from fedl2p.federation.round_records import Federated as Federated
    from fedl2p.federation.round_records import RoundRecord as RoundRecord
    from fedl2p.federation.rounds import federate as federate
    from fedl2p.federation.settings import Ray as Ray
    from fedl2p.federation.settings import Rounds as Rounds
    from fedl2p.method import Client as Client
    from fedl2p.method import Method as Method
    from fedl2p.method import Outcome as Outcome
    from fedl2p.method import Update as Update
    from fedl2p.methods.base.settings import Baselines as Baselines
    from fedl2p.methods.base.settings import Grid as Grid
    from fedl2p.methods.base.settings import LocalTraining as LocalTraining
    from fedl2p.methods.base.settings import MetaLearning as MetaLearning
    from fedl2p.methods.base.settings import Settings as Settings
    from fedl2p.runs.privacy_spent import MethodSpent as MethodSpent
    from fedl2p.runs.privacy_spent import PrivacySpent as PrivacySpent
    from fedl2p.runs.privacy_spent import StageSpent as StageSpent
    from fedl2p.runs.results import KindSummary as KindSummary
    from fedl2p.runs.results import Report as Report
    from fedl2p.runs.results import Row as Row
    from fedl2p.runs.results import Summary as Summary
    from fedl2p.study.learn import learn as learn
    from fedl2p.study.run import run_study as run_study
    from fedl2p.study.settings import Source as Source
    from fedl2p.study.settings import Study as Study

_MODULES = {
    "fedl2p.core.clientdata": ("ClientData", "Examples"),
    "fedl2p.core.finetuning.inner_loop": ("finetune",),
    "fedl2p.core.hypergradients.estimators": ("hypergradient",),
    "fedl2p.core.hyperparams": ("Hyperparams",),
    "fedl2p.core.metanets": ("MetaNets",),
    "fedl2p.core.personalization": ("Personalized", "personalize"),
    "fedl2p.core.profiles": ("Profile", "profile"),
    "fedl2p.core.settings": ("Compute", "HypergradientConfig", "InnerLoop", "MetaNetsConfig"),
    "fedl2p.core.sites": ("Sites", "find_sites"),
    "fedl2p.data.population": ("Population",),
    "fedl2p.federation.listeners": ("Listener",),
    "fedl2p.federation.privacy.settings": ("Privacy",),
    "fedl2p.federation.messages": (
        *("Answer", "Clients", "FederationError", "FrozenModel", "Question"),
    ),
    "fedl2p.federation.round_records": ("Federated", "RoundRecord"),
    "fedl2p.federation.rounds": ("federate",),
    "fedl2p.federation.settings": ("Ray", "Rounds"),
    "fedl2p.method": ("Client", "Method", "Outcome", "Update"),
    "fedl2p.methods.base.settings": (
        "Baselines",
        "Grid",
        "LocalTraining",
        "MetaLearning",
        "Settings",
    ),
    "fedl2p.runs.privacy_spent": ("MethodSpent", "PrivacySpent", "StageSpent"),
    "fedl2p.runs.results": ("KindSummary", "Report", "Row", "Summary"),
    "fedl2p.study.learn": ("learn",),
    "fedl2p.study.run": ("run_study",),
    "fedl2p.study.settings": ("Source", "Study"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    if name == "plot":
        return import_module("fedl2p.plot")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "plot"})
