"""Settings in config.json: their classes, paths and differences."""

from __future__ import annotations

import dataclasses
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedl2p.runs.files import damaged, read_json
from fedl2p.runs.validation import from_plain_inside, to_plain

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

T = TypeVar("T")

MADE_BY = "made_by"
"""The entry of config.json that is no setting: the versions that started the run."""

_KIND = "kind"


class AnyKind:
    """Marks a field, by ``Annotated``, whose type names no class to build, e.g. a protocol.

    Its JSON form has the entry ``kind: "module:class"`` besides the fields of that dataclass.
    """

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            _load_kind, serialization=core_schema.plain_serializer_function_ser_schema(_dump_kind)
        )


def _dump_kind(value: object) -> dict[str, Any]:
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    return {_KIND: kind, **to_plain(value)}


def _load_kind(plain: object) -> object:
    if not isinstance(plain, dict) or _KIND not in plain:
        raise ValueError(f"{str(plain)[:80]!r} must be an object with {_KIND} 'module:class'")
    return from_plain_inside(
        _find_class(plain[_KIND]), {k: v for k, v in plain.items() if k != _KIND}
    )


def _find_class(kind: object) -> type:
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
            f"{kind!r} is outside this package and {module!r} is not imported; if it is yours, "
            "import it before reading the file"
        ) from None
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"there is no class {kind!r}; wanted module:class") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{kind!r} is not a dataclass of settings")
    return found


def with_absolute_paths(settings: T) -> T:
    """Return the same settings with every path absolute, as seen from the working folder."""
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        return settings.absolute() if isinstance(settings, Path) else settings
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}
    absolute = {name: with_absolute_paths(value) for name, value in fields.items()}
    changed = {name: value for name, value in absolute.items() if value is not fields[name]}
    return dataclasses.replace(settings, **changed) if changed else settings


def differences(a: object, b: object, *, where: str = "") -> list[str]:
    """Return one line per field in which two settings of the same class differ."""
    if dataclasses.is_dataclass(a) and type(a) is type(b) and not isinstance(a, type):
        return [
            line
            for field in dataclasses.fields(a)
            for line in differences(
                getattr(a, field.name),
                getattr(b, field.name),
                where=f"{where}.{field.name}" if where else field.name,
            )
        ]
    return [] if a == b else [f"{where} is {a!r} and {b!r}"]


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a run's config.json; return the settings, and the versions that started the run.

    Raises
    ------
    ValueError
        If the file is missing or damaged.
    """
    settings = read_json(path)
    versions = settings.pop(MADE_BY, {})
    if not isinstance(versions, dict):
        raise damaged(path, f"{MADE_BY} is not an object of package names and versions")
    return settings, {str(name): str(version) for name, version in versions.items()}
