"""Links to files of the repository outside docs/ work in the site as they do in a clone.

A linked file is copied into the site below ``repository/``; Markdown becomes a page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PREFIX = "repository/"

_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def _inside(page: str, link: str) -> str:
    """Return where a link of a page leads, from the root of the repository."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the repository's files that pages link to."""
    root = Path(config.config_file_path or "").parent
    linked = set()
    for page in files.documentation_pages():
        links = _LINK.findall(page.content_string)
        linked |= {_inside(page.src_uri, link) for link, _ in links}
    for path in sorted(linked):
        if not path.startswith(("docs/", "..")) and (root / path).is_file():
            file = File.generated(config, PREFIX + path, abs_src_path=str(root / path))
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Let those links lead to the files in the site; others stay, and mkdocs names the broken."""
    root = Path(config.config_file_path or "").parent
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = _inside(page.file.src_uri, link[1])
        if target.startswith(("docs/", "..")) or not (root / target).is_file():
            return link[0]
        return f"]({posixpath.relpath(PREFIX + target, here or '.')}{link[2] or ''})"

    return _LINK.sub(moved, markdown)
