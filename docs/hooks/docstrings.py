"""Docstrings as the site's parser wants them.

They name code by Sphinx's roles: the site shows what these name, linked where an API page has it.
Parameters that share a description become one entry each, since the parser would show the type and
the default of the first for all of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|mod|meth|attr|data|exc):`(~?)\.?([\w.]+)`")
_SHARED = re.compile(r"^(\w+(?:, \w+)+)\n((?:[ ]+\S.*\n?|\n(?=[ ]+\S))+)", re.MULTILINE)
_ENTRY = re.compile(r"^::: ([\w.]+)", re.MULTILINE)

PAGES = Path(__file__).parents[1] / "api"


def documented() -> dict[str, str]:
    """Return what the pages of the API document, by full name and by last part."""
    found = {}
    for page in sorted(PAGES.glob("*.md")):
        for name in _ENTRY.findall(page.read_text(encoding="utf-8")):
            found[name] = name
            found.setdefault(name.rpartition(".")[2], name)
    return found


def _one_by_one(entry: re.Match[str]) -> str:
    about = entry[2].rstrip("\n")
    return "\n".join(f"{name}\n{about}" for name in entry[1].split(", ")) + "\n"


class Docstrings(Extension):
    """Rewrites every docstring."""

    def __init__(self) -> None:
        self._documented = documented()

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(self._shown, obj.docstring.value)
            obj.docstring.value = _SHARED.sub(_one_by_one, text)

    def _shown(self, role: re.Match[str]) -> str:
        name = role[2]
        last = name.rpartition(".")[2]
        target = self._documented.get(name) or (
            self._documented.get(last) if name.startswith("fedl2p.") else None
        )
        return f"[`{last}`][{target}]" if target else f"`{last if role[1] else name}`"
