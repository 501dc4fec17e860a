"""Docstrings name code by Sphinx's roles; the site shows what they name, linked where it can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|mod|meth|attr|data|exc):`(~?)\.?([\w.]+)`")
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


class SphinxRoles(Extension):
    """Replaces roles in every docstring by code, with a link if an API page has the name."""

    def __init__(self) -> None:
        self._documented = documented()

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(self._shown, obj.docstring.value)

    def _shown(self, role: re.Match[str]) -> str:
        name = role[2]
        last = name.rpartition(".")[2]
        target = self._documented.get(name) or (
            self._documented.get(last) if name.startswith("fedl2p.") else None
        )
        return f"[`{last}`][{target}]" if target else f"`{last if role[1] else name}`"
