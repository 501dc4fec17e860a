"""Help: what it shows, what it leaves to ``--help-all``, and what it must not load."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import fedl2p
from fedl2p import recipes
from fedl2p.cli import run
from fedl2p.cli.run_options import SHOWN
from support.command import call

COMMANDS = (
    "run",
    "audit",
    "table",
    "personalize",
    "explain",
    "compare",
    "report",
    "recipes",
    "data",
)


def options_in(printed: str) -> dict[str, str]:
    """Return the options in a help, or arguments in capitals, with what is said of each."""
    options: list[str] = []
    for line in printed.splitlines():
        text = line.strip("│ ")
        if re.match(r"[│ ] (--[a-z]|\[?[A-Z]{4,})", line):
            options.append(text)
        elif options:
            options[-1] += f" {text}"
    return {option.split()[0].rstrip(","): option for option in options}


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert call(*args) == 0
    return capsys.readouterr().out


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown(capsys, "--help")
    for command in COMMANDS:
        assert re.search(rf"• {command} +\w", printed)
    assert "fedl2p data get|check|make NAME" in printed
    assert shown(capsys, "--version").startswith("fedl2p 0.")


def test_recipes_have_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown(capsys, "recipes")
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.names())
    assert all(len(line.split()) > 3 for line in lines)
    assert "(also cifar10_published, cifar10_smoke, cifar10_published_smoke)" in printed
    # help without a recipe lists them too
    assert shown(capsys, "run", "--help").endswith(printed)


@pytest.mark.parametrize(
    "args",
    [
        *(["run", "digits", "--help"], ["run", "digits", "--help-all"]),
        ["audit", "digits", "--help"],
        *(["run", "npz", "--help-all"], ["run", "speech", "--help-all"]),
        *(["personalize", "--help"], ["explain", "--help"], ["table", "--help"]),
        *(["compare", "--help"], ["report", "--help"], ["data", "get", "--help"]),
    ],
    ids=" ".join,
)
def test_help_explains_every_option(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown(capsys, *args)
    assert not re.search(r":(class|func|meth|mod):", printed)
    options = options_in(printed)
    assert options
    for option in options.values():
        # Names and type are at most three words; what follows, up to the default, describes.
        described = re.sub(r"\((default|required).*", "", option)
        assert len(described.split()) > 4, f"no description: {option}"


@pytest.mark.parametrize("name", recipes.names())
def test_the_main_options_fit_on_three_screens(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = shown(capsys, "run", name, "--help")
    assert len(printed.splitlines()) <= 150
    options = options_in(printed)
    assert 15 <= len(options) <= 25
    for option in ("--out", "--seed", "--methods", "--learn.rounds", "--device"):
        assert option in options
    assert f"fedl2p run {name} --help-all" in printed
    everything = options_in(shown(capsys, "run", name, "--help-all"))
    assert len(everything) > 100
    for option, described in options.items():
        # the same names, types and defaults
        assert everything[option].split()[:2] == described.split()[:2]
        defaults = [re.findall(r"\(default: .*\)", d) for d in (everything[option], described)]
        assert defaults[0] == defaults[1]


def test_the_table_of_main_options_names_options_only(capsys: pytest.CaptureFixture[str]) -> None:
    known = {
        option
        for name in recipes.names()
        for option in options_in(shown(capsys, "run", name, "--help-all"))
    } | {*options_in(shown(capsys, "audit", "digits", "--help-all"))}
    listed = [path for _, paths in SHOWN.values() for path in paths.split()]
    assert {f"--{path.replace('_', '-')}" for path in listed} <= known
    assert len(set(listed)) == len(listed)


def test_groups_say_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip("╭─╮│ ") for line in shown(capsys, "run", "smoke", "--help").splitlines()]
    for title, (description, _) in SHOWN.items():
        assert description in lines[lines.index(f"{title} options") :]


def test_help_shows_the_recipes_own_values(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ("--help", "--help-all"):
        options = options_in(shown(capsys, "run", "smoke", more))
        assert "(default: 6)" in options["--data.seen"]
        assert "--recipe" not in options


def test_without_a_change_the_study_is_the_recipes(tmp_path: Path) -> None:
    for name in recipes.names():
        parsed = run.command([name, "--out", str(tmp_path)])
        assert isinstance(parsed, run.Run)
        assert parsed.study == recipes.get(name)


def test_an_option_that_help_does_not_show_is_parsed(tmp_path: Path) -> None:
    args = ["smoke", "--out", str(tmp_path), "--learn.server-beta1", "0.5", "--data.sizes", "3"]
    parsed = run.command(args)
    assert isinstance(parsed, run.Run)
    assert parsed.study.learn.server_beta1 == 0.5
    assert parsed.study.learn.rounds == recipes.smoke().learn.rounds
    assert parsed.study.data.sizes == (3,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "args",
    [["--help"], ["recipes"], ["run", "digits", "--help"], ["run", "cifar10_smoke", "--help-all"]],
    ids=" ".join,
)
def test_help_loads_no_library_that_computes(args: list[str]) -> None:
    code = (
        "import sys; from fedl2p.cli import main\n"
        f"try: main({args})\n"
        "except SystemExit as stop: print(f'status {stop.code}')\n"
        "print(*sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(fedl2p.__file__).parents[1])},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *_, status, modules = done.stdout.splitlines()
    assert status == "status 0"
    roots = {module.partition(".")[0] for module in modules.split()}
    assert "fedl2p" in roots
    heavy = {"torch", "numpy", "scipy", "flwr", "ray", "sklearn", "rich", "matplotlib", "captum"}
    assert not heavy & roots
    # a quarter of this on an idle machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_a_module_imported_for_help_computes_afterwards() -> None:
    """Its torch and numpy are proxies then, which import the packages when they are used."""
    code = (
        "import sys; from fedl2p.cli import main\n"
        "try: main(['run', 'smoke', '--help'])\n"
        "except SystemExit: pass\n"
        "from fedl2p import recipes\n"
        "population = recipes.smoke().data.open(0)\n"
        "import torch\n"
        "assert isinstance(population.open(population.seen[0]).train.x, torch.Tensor)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={"PYTHONPATH": str(Path(fedl2p.__file__).parents[1])},
    )
