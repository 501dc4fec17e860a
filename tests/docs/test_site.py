"""The site: every public name is on a page of the API and has a docstring; it needs no network."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

import fedl2p
import fedl2p.flower

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"


def entries() -> list[str]:
    """Return the full names that the pages of the API show."""
    pages = (page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md")))
    return [name for page in pages for name in re.findall(r"^::: ([\w.]+)", page, re.MULTILINE)]


def test_every_public_name_is_on_one_page_of_the_api() -> None:
    public = {f"fedl2p.{name}" for name in fedl2p.__all__ if name != "__version__"}
    public |= {f"fedl2p.flower.{name}" for name in fedl2p.flower.__all__}
    drawn = vars(fedl2p.plot).items()
    public |= {
        f"fedl2p.plot.{name}"
        for name, value in drawn
        if inspect.isfunction(value) and value.__module__ == "fedl2p.plot" and name[0] != "_"
    }
    missing = public - set(entries())
    assert not missing, f"add ::: NAME to the page of docs/api/ where a reader looks: {missing}"
    assert len(entries()) == len(set(entries()))


@pytest.mark.parametrize("name", entries())
def test_what_the_api_shows_has_docstrings(name: str) -> None:
    module, _, last = name.rpartition(".")
    shown = getattr(import_module(module), last)
    assert inspect.getdoc(shown), f"{name} has no docstring"
    if not isinstance(shown, type):
        return
    for member, value in vars(shown).items():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if member.startswith("_") or not inspect.isfunction(function):
            continue
        assert inspect.getdoc(getattr(shown, member)), f"{name}.{member} has no docstring"


class Loaded(HTMLParser):
    """Collects what a browser loads of a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loads = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
        if tag in loads and (address := values.get(loads[tag])):
            self.addresses.append(address)


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        parser = Loaded()
        parser.feed(text)
        assert parser.addresses
        remote = [a for a in parser.addresses if re.match(r"(?:\w+:)?//", a)]
        assert not remote, f"{page.name} loads {remote}"
        assert "arithmatex" not in text, f"{page.name} has a formula that is not MathML"
        assert not re.search(r":(?:class|func|mod|meth):`", text), f"{page.name} shows a role"
    assert "<math" in (tmp_path / "site/method.html").read_text(encoding="utf-8")
