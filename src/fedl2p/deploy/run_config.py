"""The run configuration of the Flower app: scalars by name that become a study.

``flwr run --run-config "recipe='federation' learn.rounds=20"`` knows scalars only. A study's field
is named as on the command line of ``fedl2p run``, without the dashes in front; a list is one text
with commas. An empty text leaves a field as the recipe has it: Flower wants every key to stand in
the app's pyproject.toml before it can be set.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedl2p import recipes
from fedl2p.federation.settings import GRACE, TIMEOUT
from fedl2p.runs.validation import from_plain, to_plain
from fedl2p.study.preparation import build_methods
from fedl2p.study.settings import Study

Scalar = bool | int | float | str
Task = Literal["study", "personalize"]

# Fields of a study that mean nothing where clients are on nodes, or are decided otherwise.
_NOT_SET_HERE = ("recipe", "engine", "data.kind", "data.clients")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run of the Flower app is to do.

    Parameters
    ----------
    study
        The study; on nodes, what they take part in.
    task
        study: the whole job; personalize: clients that joined after learning personalize
        themselves with what ``run`` has learned.
    out
        Folder on the server's machine for the results; None to keep nothing.
    resume
        Go on with the run in ``out``.
    run
        For the task personalize: the folder, on the server's machine, of a finished study.
    clients
        Names of the clients that take part; empty for all that answer.
    min_clients
        Clients to wait for before the start, a number.
    wait
        Seconds to wait for them.
    timeout
        Seconds to wait for the answers to one question; who has not answered then has failed in
        that round. 0: wait until Flower itself gives a node up, which it does about a minute after
        the last sign of life.
    grace
        When half of the clients have answered, the others have as long again as these needed, but
        at least so many seconds. 0: they have until the timeout.
    keys
        Folder on the server's machine with a ``CLIENT.pub`` file per client: a client is believed
        only on the node that has that key. None to believe every node.
    tensorboard
        Write the rounds for TensorBoard too, into the folder tensorboard/ of ``out``; needs the
        package tensorboard on the server.
    """

    study: Study
    task: Task = "study"
    out: Path | None = None
    resume: bool = False
    run: Path | None = None
    clients: tuple[str, ...] = ()
    min_clients: int = 1
    wait: float = 600.0
    timeout: float = TIMEOUT
    grace: float = GRACE
    keys: Path | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.min_clients < 1:
            raise ValueError(f"min-clients is {self.min_clients}, but must be 1 or more")
        for name in ("wait", "timeout", "grace"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 0 seconds or more")
        if self.tensorboard and self.out is None:
            raise ValueError("tensorboard is written into out; name that folder")
        if (self.task == "personalize") != (self.run is not None):
            raise ValueError(
                "run names the finished study of the task 'personalize' and is for that task "
                f"only; task is {self.task!r} and run is {str(self.run or '')!r}"
            )


_OWN = tuple(field.name for field in dataclasses.fields(RunConfig) if field.name != "study")


def read(config: Mapping[str, Scalar]) -> RunConfig:
    """Return what a run configuration asks for.

    Parameters
    ----------
    config
        ``Context.run_config``: ``recipe``, the fields of :class:`RunConfig`, those of the
        recipe's study, e.g. ``learn.clients-per-round``, and ``fields``: any fields of the study as
        JSON, e.g. ``{"learn": {"rounds": 3}}``.

    Raises
    ------
    ValueError
        If a key is unknown, or a value is of the wrong type or refused; one line that names it.
    """
    given = {key: value for key, value in config.items() if value != ""}
    study = recipes.get(str(given.pop("recipe", "digits")))
    plain = _merged(to_plain(study), _fields(given.pop("fields", "{}")))
    paths = dict(fields_of(study))
    own: dict[str, Any] = {}
    hints = typing.get_type_hints(RunConfig)
    for key, value in given.items():
        if key.replace("-", "_") in _OWN and "_" not in key:
            name = key.replace("-", "_")
            own[name] = _fit(value, hints[name])
        elif key in paths:
            *groups, last = paths[key].split(".")
            target = plain
            for group in groups:
                target = target[group]
            target[last] = _fit(value, _hint_of(study, paths[key]))
        else:
            raise ValueError(_unknown(key, paths))
    try:
        study = from_plain(Study, plain)
        build_methods(study)  # before anybody waits for clients
        return from_plain(RunConfig, {"study": to_plain(study), **own})
    except ValueError as problem:
        raise ValueError(f"the run's configuration cannot be used: {problem}") from None


def fields_of(study: Study) -> Iterator[tuple[str, str]]:
    """Yield key and dotted path of every field of a study that a run configuration may set."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
        for field in dataclasses.fields(value):
            inner = f"{path}.{field.name}" if path else field.name
            item = getattr(value, field.name)
            if inner in _NOT_SET_HERE:
                continue
            if dataclasses.is_dataclass(item):
                yield from walk(item, inner)
            else:
                yield inner.replace("_", "-"), inner

    return walk(study, "")


def _hint_of(study: Study, path: str) -> Any:
    """Return the declared type of a field of a study."""
    value: Any = study
    *groups, last = path.split(".")
    for group in groups:
        value = getattr(value, group)
    return typing.get_type_hints(type(value))[last]


def _fit(value: Scalar, hint: Any) -> Any:
    """Return a scalar as the field's type has it: a list of a text with commas, ``none`` as None.

    What does not fit is passed on as it is and refused where all types are checked.
    """
    if value == "none" and type(None) in get_args(hint):
        return None
    if typing.get_origin(hint) is tuple:
        of = get_args(hint)[0]
        items = [item.strip() for item in str(value).split(",") if item.strip()]
        return items if of is str else [_number(item) for item in items]
    return value


def _fields(text: Scalar) -> dict[str, Any]:
    try:
        fields = json.loads(str(text))
    except json.JSONDecodeError as problem:
        raise ValueError(f"fields in the run's configuration is no JSON: {problem}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"fields in the run's configuration is {fields!r}, wanted a JSON object")
    return fields


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with some replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown(key: str, paths: Mapping[str, str]) -> str:
    known = ["recipe", "fields", *(name.replace("_", "-") for name in _OWN), *paths]
    similar = difflib.get_close_matches(key, known, n=3)
    hint = f"; perhaps you meant {' or '.join(similar)}" if similar else ""
    return f"unknown key {key!r} in the run's configuration{hint}"
