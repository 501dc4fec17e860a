"""Who is told of the rounds: a progress bar, a CSV file, TensorBoard, or anything of one's own."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import (
    Progress as Bars,
)

from fedl2p.federation.records import COLUMNS, RoundRecord


class Listener(Protocol):
    """Is told of a stage's start, of every round, and of the end, also of an interrupted stage."""

    def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
        """Begin a stage.

        Parameters
        ----------
        stage
            Its name.
        rounds
            Most rounds that it will take; 0 if it has none (personalization).
        done
            Records of the rounds before a resumption.
        """

    def on_round(self, record: RoundRecord) -> None:
        """Take note of a finished round, whose checkpoint is written."""

    def on_end(self, stage: str) -> None:
        """End a stage."""


class CsvListener:
    """Writes ``rounds.csv``: a line is in the file as soon as its round is over.

    Parameters
    ----------
    path
        The file. Lines of other stages stay; those of a stage that starts are replaced by what it
        has done so far, so that a resumed run leaves no line out and none double.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
        """Make the file agree with what is done."""
        others: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                others = [row for row in list(csv.reader(file))[1:] if row and row[0] != stage]
        unfinished = self.path.with_name(f".{self.path.name}.tmp")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, *others, *(record.line() for record in done)])
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def on_round(self, record: RoundRecord) -> None:
        """Append a line."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(record.line())

    def on_end(self, stage: str) -> None:
        """Do nothing: the file is complete after every round."""


class ProgressListener:
    """Two bars on the terminal: the stages of the study, and the rounds of the current one.

    Use it as a context manager, so that the terminal is tidy again after an error.

    Parameters
    ----------
    stages
        How many stages will be told of; None if unknown.
    console
        Where to draw; None for standard error. Nothing is drawn if it is no terminal.
    """

    def __init__(self, *, stages: int | None = None, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._stages = self._bars.add_task("stages", total=stages, note="")
        self._rounds: TaskID | None = None

    def __enter__(self) -> ProgressListener:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
        """Show a bar for the stage."""
        self._bars.start()
        self._bars.update(self._stages, note=stage)
        self._rounds = self._bars.add_task(
            "rounds" if rounds else "clients", total=rounds or None, completed=len(done), note=""
        )

    def on_round(self, record: RoundRecord) -> None:
        """Move it and show loss and accuracy."""
        if self._rounds is None:
            return
        note = f"loss {record.loss:.3f}  accuracy {record.accuracy:.3f}"
        if record.failures:
            note += f"  failures {record.failures}"
        total = self._bars.tasks[self._bars.task_ids.index(self._rounds)].total
        # The pass that judges the last state is one more than the rounds.
        self._bars.update(self._rounds, completed=min(record.round, total or 0), note=note)

    def on_end(self, stage: str) -> None:
        """Take the stage's bar away."""
        if self._rounds is not None:
            self._bars.remove_task(self._rounds)
            self._rounds = None
        self._bars.advance(self._stages)


class TensorBoardListener:
    """Writes loss, accuracy and bytes of each round for TensorBoard.

    Parameters
    ----------
    folder
        Where its event files go.

    Raises
    ------
    ModuleNotFoundError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "TensorBoard is not installed; `pip install tensorboard`, or do not ask for it"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
        """Write the rounds before a resumption again: TensorBoard shows the last value."""
        for record in done:
            self.on_round(record)

    def on_round(self, record: RoundRecord) -> None:
        """Write one point per curve."""
        for name in ("loss", "accuracy", "bytes_down", "bytes_up", "failures"):
            self._writer.add_scalar(f"{record.stage}/{name}", getattr(record, name), record.round)

    def on_end(self, stage: str) -> None:
        """Make sure that the files are complete."""
        self._writer.flush()
