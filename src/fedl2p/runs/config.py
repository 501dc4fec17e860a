"""Settings as JSON and back: frozen dataclasses of plain values, nested to any depth."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_KIND = "kind"


def to_plain(value: object) -> Any:
    """Return settings as JSON values.

    A dataclass in a field whose type does not name its class (e.g. a protocol) gets the extra entry
    ``kind: "module:class"``, which :func:`from_plain` needs to build it again.

    Raises
    ------
    ValueError
        If a value has no JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        plain = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            plain[field.name] = to_plain(item)
            if dataclasses.is_dataclass(item) and not _names_class(hints[field.name], type(item)):
                kind = f"{type(item).__module__}:{type(item).__qualname__}"
                plain[field.name] = {_KIND: kind, **plain[field.name]}
        return plain
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"a setting of type {type(value).__name__} has no JSON form; use numbers, text, tuples and "
        "dataclasses of these"
    )


def from_plain(kind: type[T], plain: object, *, where: str = "") -> T:
    """Build settings of one class from JSON values; the inverse of :func:`to_plain`.

    Parameters
    ----------
    kind
        The dataclass to build.
    plain
        What :func:`to_plain` gave.
    where
        Name of the enclosing field, for messages.

    Raises
    ------
    ValueError
        If a field is unknown, missing, of another type, or refused by the class itself.
    """
    return typing.cast(T, _build(kind, plain, where))


def differences(a: object, b: object, *, where: str = "") -> list[str]:
    """Return one line per field in which two settings of the same class differ."""
    if dataclasses.is_dataclass(a) and type(a) is type(b) and not isinstance(a, type):
        return [
            line
            for field in dataclasses.fields(a)
            for line in differences(
                getattr(a, field.name), getattr(b, field.name), where=_join(where, field.name)
            )
        ]
    return [] if a == b else [f"{where} is {a!r} and {b!r}"]


def _build(kind: Any, plain: object, where: str) -> object:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(kind, plain, where)
    if origin is typing.Annotated:
        return _build(typing.get_args(kind)[0], plain, where)
    if origin is typing.Literal:
        return _expect(
            plain in typing.get_args(kind), plain, where, f"one of {typing.get_args(kind)}"
        )
    if origin in (tuple, list):
        return _build_sequence(origin, typing.get_args(kind), plain, where)
    if dataclasses.is_dataclass(kind) or (isinstance(plain, Mapping) and _KIND in plain):
        return _build_dataclass(kind, plain, where)
    if kind is Path:
        return Path(str(_expect(isinstance(plain, str), plain, where, "a path")))
    if kind is float:
        number = isinstance(plain, (int, float)) and not isinstance(plain, bool)
        try:
            return float(typing.cast(float, _expect(number, plain, where, "a number")))
        except OverflowError:
            raise ValueError(f"{where} is larger than any float") from None
    return _expect(type(plain) is kind, plain, where, getattr(kind, "__name__", str(kind)))


def _build_union(kind: Any, plain: object, where: str) -> object:
    options = typing.get_args(kind)
    if plain is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _build(option, plain, where)
        except ValueError as problem:
            problems.append(str(problem))
    raise ValueError(problems[0])


def _build_sequence(origin: type, of: tuple[Any, ...], plain: object, where: str) -> object:
    _expect(isinstance(plain, list), plain, where, "a list")
    items = typing.cast(list[object], plain)
    if origin is tuple and not (len(of) == 2 and of[1] is Ellipsis):
        _expect(len(of) == len(items), plain, where, f"a list of {len(of)} values")
        kinds = list(of)
    else:
        kinds = [of[0]] * len(items)
    built = [
        _build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, items, strict=True))
    ]
    return origin(built)


def _build_dataclass(kind: Any, plain: object, where: str) -> object:
    _expect(isinstance(plain, Mapping), plain, where, "a group of fields")
    fields = dict(typing.cast(Mapping[str, object], plain))
    if _KIND in fields:
        kind = _find_class(fields.pop(_KIND), where)
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for name in fields:
        if name not in known:
            there = ", ".join(sorted(known))
            raise ValueError(f"unknown field {_join(where, name)!r}; {kind.__name__} has {there}")
    built = {name: _build(hints[name], item, _join(where, name)) for name, item in fields.items()}
    try:
        return kind(**built)
    except TypeError as problem:
        raise ValueError(f"{where or kind.__name__}: {problem}") from None


def _find_class(kind: object, where: str) -> type:
    """Return the dataclass that ``kind``, "module:class", names.

    To import a module is to run its code, which no file may ask for: outside this package only what
    the program itself has imported is found.
    """
    module, _, name = str(kind).partition(":")
    try:
        ours = module.partition(".")[0] == __name__.partition(".")[0]
        found = getattr(import_module(module) if ours else sys.modules[module], name)
    except KeyError:
        raise ValueError(
            f"{where}: {kind!r} is outside this package and {module!r} is not imported; if it is "
            "yours, import it before reading the file"
        ) from None
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"{where}: there is no class {kind!r}; wanted module:class") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{where}: {kind!r} is not a dataclass of settings")
    return found


def _names_class(hint: Any, kind: type) -> bool:
    """Tell whether a field's type leaves no other class to build than this one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [o for o in typing.get_args(hint) if dataclasses.is_dataclass(o)] == [kind]
    return hint is kind


def _expect(fits: bool, value: object, where: str, wanted: str) -> object:
    if not fits:
        raise ValueError(f"{where} is {value!r}, but must be {wanted}")
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
