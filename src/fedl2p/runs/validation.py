"""Dataclasses to and from JSON values and text, checked by pydantic; errors of one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def to_plain(value: object) -> dict[str, Any]:
    """Return a dataclass as JSON values, a path as text.

    Raises
    ------
    ValueError
        If a value has no JSON form.
    ModuleNotFoundError
        If pydantic is not installed.
    """
    fields = _adapter(type(value)).dump_python(value, warnings="none")
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=_path_as_text))
    return plain


def _path_as_text(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"a setting of type {type(value).__name__} has no JSON form; use numbers, text, tuples and "
        "dataclasses of these"
    )


def from_plain(kind: type[T], plain: object) -> T:
    """Return a dataclass from JSON values; the inverse of :func:`to_plain`.

    Raises
    ------
    ValueError
        In one line, with the field, what came and what was wanted: if a field is unknown, missing,
        of another type, or refused by its class.
    ModuleNotFoundError
        If pydantic is not installed.
    """
    with _errors_of_one_line():
        return from_plain_inside(kind, plain)


def from_plain_inside(kind: type[T], plain: object) -> T:
    """As from_plain, for a validator: pydantic puts its own error into that of the whole."""
    # As JSON, where a list may stand for a tuple and text for a path.
    return _adapter(kind).validate_json(json.dumps(plain), strict=True, extra="forbid")


def from_text(kind: type[T], values: Mapping[str, str]) -> T:
    """Return a dataclass from one text per field. Errors as in :func:`from_plain`."""
    with _errors_of_one_line():
        return _adapter(kind).validate_strings(values)


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """Return pydantic's reader and writer of a type.

    Raises
    ------
    ValueError
        If values of that type have no JSON form.
    ModuleNotFoundError
        If pydantic is not installed.
    """
    try:
        import pydantic
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pydantic, which checks the files of a run, is not installed; "
            "pip install 'fedl2p[runs]'",
            name=error.name,
        ) from error
    try:
        if kind not in _ADAPTERS:
            _ADAPTERS[kind] = pydantic.TypeAdapter(kind)
        return _ADAPTERS[kind]
    except pydantic.errors.PydanticUserError as error:
        why = str(error).partition(". ")[0]
        raise ValueError(
            f"a field of {kind.__name__} has no JSON form ({why}); use numbers, text, tuples and "
            "dataclasses of these"
        ) from None


@contextlib.contextmanager
def _errors_of_one_line() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            raise ValueError(_one_line(error)) from None
        raise


def _one_line(error: ValidationError) -> str:
    """Return the first of pydantic's errors in one line, and how many more there are."""
    errors = error.errors(include_url=False)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _described(cast("dict[str, Any]", errors[0])) + more


def _described(error: dict[str, Any]) -> str:
    where = _dotted(error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown field {where!r}; correct its name or remove it"
    if error["type"] == "value_error":  # of the class itself, which names its field
        said = " ".join(str(error["ctx"]["error"]).split())
        return f"{where}: {said}" if where else said
    value = repr(error["input"])
    value = value if len(value) <= 80 else f"{value[:77]}..."
    said = error["msg"].replace("Input should be", "must be")
    return f"{where or 'it'} is {value}, but {said}"


def _dotted(places: tuple[int | str, ...]) -> str:
    """Return the name of a field within others, e.g. ``data.shape[1]``."""
    text = ""
    for place in places:
        text += f"[{place}]" if isinstance(place, int) else f".{place}"
    return text.removeprefix(".")
