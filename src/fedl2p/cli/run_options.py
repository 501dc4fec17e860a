"""The options of ``fedl2p run RECIPE``: a study's fields, few of which ``--help`` shows."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Annotated, Any, get_type_hints

from docstring_parser import numpydoc
from tyro import MISSING
from tyro.conf import arg
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from fedl2p.study.settings import Study

SHOWN = {
    "study": ("What to run.", "methods model loss pretrained seed"),
    "data": (
        "Whose data.",
        "data.path data.root data.dataset data.image data.label data.partitioner data.seen "
        "data.unseen data.alpha",
    ),
    "rounds": (
        "How long.",
        "pretrain.rounds pretrain.clients_per_round learn.rounds learn.clients_per_round",
    ),
    "personalization": (
        "How clients fine-tune, and how FedL2P learns to.",
        "settings.finetune.epochs settings.finetune.batch_size settings.finetune.early_stopping "
        "settings.finetune_rate settings.meta.nets.base_rate settings.meta.hypergradient.mode",
    ),
    "output": ("Where and how.", "out resume folds engine device"),
}
"""The options in ``--help`` by group, with the group's description.

Those that the recipe's data source lacks are left out. Options that are not listed here are parsed
too; ``--help-all`` shows them.
"""

REGISTRY = ConstructorRegistry()
"""Tells tyro that every field of a study is an option, but not the recipe: it is named first."""


@REGISTRY.struct_rule
def _study_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    if info.type is not Study:
        return None
    hints = get_type_hints(Study)
    hints.pop("recipe")
    return StructConstructorSpec(
        instantiate=functools.partial(dataclasses.replace, info.default),
        fields=tuple(
            StructFieldSpec(
                name=name,
                type=hint,
                default=getattr(info.default, name),
                helptext=_description(Study, name),
            )
            for name, hint in hints.items()
        ),
    )


def shown_options(run: Any) -> type:
    """Return a dataclass of the options in :data:`SHOWN`, a field per group, to print as help.

    Parameters
    ----------
    run
        Has the command's own options as attributes, and ``study``, the recipe's.
    """
    groups = []
    for title, (summary, paths) in SHOWN.items():
        fields = [field for path in paths.split() for field in _shown(run, path)]
        group = dataclasses.make_dataclass(title, fields, kw_only=True)
        group.__doc__ = summary
        groups.append((title, group))
    return dataclasses.make_dataclass("Shown", groups)


def _shown(run: Any, path: str) -> list[tuple[str, Any, Any]]:
    """Return name, type and default of the option at a dotted path; nothing if there is none."""
    *groups, name = path.split(".")
    owner = run if hasattr(run, path) else functools.reduce(getattr, groups, run.study)
    if not hasattr(owner, name):
        return []
    kind, default = type(owner), getattr(owner, name)
    option = arg(name=path, help=_description(kind, name), prefix_name=False)
    return [
        (
            path.replace(".", "_"),
            Annotated[get_type_hints(kind, include_extras=True)[name], option],
            dataclasses.MISSING if default is MISSING else dataclasses.field(default=default),
        )
    ]


def _description(kind: type, name: str) -> str:
    """Return what a class's docstring says of a parameter, in one line."""
    parameters = numpydoc.parse(inspect.getdoc(kind) or "").params
    (text,) = (p.description or "" for p in parameters if name in p.arg_name.split(", "))
    return " ".join(text.split())
