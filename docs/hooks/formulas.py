"""Formulas as MathML at build time, which browsers render by themselves: no script is loaded."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked as TeX."""
    content = _INLINE.sub(lambda tex: convert(html.unescape(tex[1])), content)
    return _BLOCK.sub(
        lambda tex: (
            f'<div class="formula">{convert(html.unescape(tex[1]).strip(), display="block")}</div>'
        ),
        content,
    )
