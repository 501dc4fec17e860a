"""What a release says of itself is the same in every file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import fedl2p

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == fedl2p.__version__ == citation["version"]
    released = re.findall(
        r"^## (\d\S*) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert released[0] == (fedl2p.__version__, str(citation["date-released"]))


def test_the_workflow_runs_what_must_pass_and_publishes_what_it_builds() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = jobs["checks"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert re.search(r"^make .*\bdocs\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    (site,) = [step["with"]["path"] for step in steps if "pages-artifact" in step.get("uses", "")]
    assert site == "site"
    assert jobs["publish"]["needs"] == "checks"


def test_pre_commit_runs_the_tools_of_make_lint() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].split() for repo in config["repos"] for hook in repo["hooks"]]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    wanted = [line.split()[:2] for line in lint.splitlines()[1:]]
    tools = [[word.replace("$(BIN)", ".venv/bin") for word in words] for words in wanted]
    assert [hook[: len(tool)] for hook, tool in zip(hooks, tools, strict=True)] == tools
