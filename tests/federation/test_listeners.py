"""Listeners: rounds.csv stays right over a resumption, bars show two levels, all are told all."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fedl2p import ClientData, learn
from fedl2p.federation.listeners import (
    CsvListener,
    Listener,
    ProgressListener,
    TensorBoardListener,
    progress_bar,
)
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.round_records import RoundRecord
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from support.federation_toys import Line, Toward, model

HEADER = "stage,round,clients,loss,accuracy,seconds,bytes_down,bytes_up,failures"


def record(stage: str, round: int, failures: int = 0) -> RoundRecord:
    return RoundRecord(stage, round, 4, 0.1 + 0.2, 0.5, 1.5, 100, 50, failures)


def line(stage: str, round: int) -> str:
    return f"{stage},{round},4,0.30000000000000004,0.5,1.5,100,50,0"


def test_csv_has_the_columns_and_a_line_as_soon_as_a_round_is_over(tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    listener = CsvListener(path)
    listener.on_start("pretrain", 2, ())
    assert path.read_text() == HEADER + "\n"
    listener.on_round(record("pretrain", 1))
    assert path.read_text().splitlines() == [HEADER, line("pretrain", 1)]


def test_csv_neither_loses_nor_doubles_a_line_over_a_resumption(tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    listener = CsvListener(path)
    for stage, rounds in (("pretrain", 2), ("learn", 3)):
        listener.on_start(stage, rounds, ())
        for number in range(1, rounds + 1):
            listener.on_round(record(stage, number))
        listener.on_end(stage)
    # Resumed: learn had a checkpoint after round 2 only, pretrain was finished.
    again = CsvListener(path)
    again.on_start("pretrain", 2, [record("pretrain", 1), record("pretrain", 2)])
    again.on_start("learn", 3, [record("learn", 1), record("learn", 2)])
    again.on_round(record("learn", 3))
    assert path.read_text().splitlines() == [
        HEADER,
        *(line("pretrain", i) for i in (1, 2)),
        *(line("learn", i) for i in (1, 2, 3)),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rounds.csv"]


def test_bars_show_stage_round_loss_and_failures() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=140)
    with ProgressListener(stages=2, console=console) as bars:
        bars.on_start("learn", 3, [record("learn", 1)])
        bars.on_round(record("learn", 2, failures=1))
        bars.on_round(record("learn", 4))
        bars._bars.refresh()
        bars.on_end("learn")
        bars.on_start("personalize fedl2p", 0, ())
        bars.on_client("personalize fedl2p", 3, 7)
        bars._bars.refresh()
        bars.on_end("personalize fedl2p")
    text = out.getvalue()
    for part in (
        "stages",
        "learn",
        "rounds",
        "3/3",
        "loss 0.300  accuracy 0.500",
        "clients",
        "3/7",
    ):
        assert part in text, part


def test_bars_draw_nothing_where_there_is_no_terminal() -> None:
    out = StringIO()
    with ProgressListener(console=Console(file=out)) as bars:
        bars.on_start("learn", 3, ())
        bars.on_round(record("learn", 1))
        bars.on_end("learn")
    assert out.getvalue().strip() == ""


class Stderr(StringIO):
    """A standard error that is a terminal, or is not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("show", [True, False])
def test_learn_shows_a_bar_in_a_terminal_unless_told_not_to(
    show: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = Stderr(terminal)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    torch.manual_seed(0)
    part = (torch.randn(8, 4), torch.randint(2, (8,)))
    learn(nn.Linear(4, 2), {"a": ClientData(part, part)}, rounds=Rounds(rounds=2), progress=show)
    text = err.getvalue()
    if show and terminal:
        assert "learn" in text
        assert "0/2" in text
        assert "stages" not in text
    else:
        assert text == ""


def test_without_rich_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Stderr(True)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with progress_bar() as listeners:
        assert listeners == []
    assert err.getvalue() == ""


@pytest.mark.parametrize("widgets", [True, False])
def test_in_a_notebook_it_needs_ipywidgets(widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    found = ["rich", "ipywidgets"] if widgets else ["rich"]
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name in found else None
    )
    monkeypatch.setattr("rich.live.Live.refresh", lambda self: None)
    with progress_bar() as listeners:
        assert len(listeners) == widgets


def test_tensorboard_that_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="TensorBoard is not installed; `pip install"):
        TensorBoardListener(tmp_path)


def test_tensorboard_writes_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    listener = TensorBoardListener(tmp_path)
    listener.on_start("learn", 2, [record("learn", 1)])
    listener.on_round(record("learn", 2))
    listener.on_end("learn")
    assert any(p.stat().st_size for p in tmp_path.iterdir())


def test_every_listener_is_told_everything_also_of_an_error() -> None:
    told: list[Any] = []

    class Noting(Listener):
        def on_start(self, stage: str, rounds: int, done: Any) -> None:
            told.append(("start", stage, rounds, len(done)))

        def on_round(self, record: RoundRecord) -> None:
            told.append((record.stage, record.round))
            if record.round == 3:
                raise KeyboardInterrupt

        def on_client(self, stage: str, done: int, clients: int) -> None:
            told.append((done, clients))

        def on_end(self, stage: str) -> None:
            told.append(("end", stage))

    arguments: Any = (Toward(), model(), Line())
    federate(*arguments, rounds=Rounds(rounds=1), seed=0, stage="learn", listeners=[Noting()])
    personalize_all(
        Toward(), model(), Toward().start(model()), Line(), seed=0, listeners=[Noting()]
    )
    whole = [("start", "learn", 1, 0), ("learn", 1), ("learn", 2), ("end", "learn")]
    count = len(Line().names)
    each = [(done, count) for done in range(1, count + 1)]
    ours = [("start", "personalize toward", 0, 0), *each, ("end", "personalize toward")]
    assert told == whole + ours
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        federate(*arguments, rounds=Rounds(rounds=5), seed=0, stage="learn", listeners=[Noting()])
    assert told[-2:] == [("learn", 3), ("end", "learn")]
