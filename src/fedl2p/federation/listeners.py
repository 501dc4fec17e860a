"""Listeners of the rounds: a progress bar, a CSV file, TensorBoard, or a user's own."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedl2p.atomic_files import open_to_append, write_text
from fedl2p.federation.round_records import RoundRecord
from fedl2p.runs.columns import (
    FAILURE_COLUMNS,
    ROUND_COLUMNS,
    FailureLine,
    RoundLine,
    names_of,
    to_csv,
    values_of,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Listener:
    """Is called at a stage's start, after every round, and at its end, also if interrupted.

    Each method does nothing unless a subclass overrides it.
    """

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

    def on_client(self, stage: str, done: int, clients: int) -> None:
        """Take note that ``done`` of ``clients`` have personalized themselves so far."""

    def on_personalized(self, stage: str, failures: Mapping[str, str]) -> None:
        """Take note of which clients could not be personalized, and why, in one line each."""

    def on_end(self, stage: str) -> None:
        """End a stage."""


class _Table(Listener):
    """A CSV file that grows with the rounds, and neither loses nor doubles a line."""

    columns: tuple[str, ...]

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, record: RoundRecord) -> list[tuple[Any, ...]]:
        """Return what a round adds."""
        raise NotImplementedError

    def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
        """Make the file agree with what is done."""
        others: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                others = list(csv.reader(file))[1:]
        # A full disk may have cut the last line off anywhere; its stage writes it again.
        others = [row for row in others if len(row) == len(self.columns) and row[0] != stage]
        lines = (line for record in done for line in self.lines(record))
        write_text(self.path, to_csv([self.columns, *others, *lines]))

    def on_round(self, record: RoundRecord) -> None:
        """Append the lines of a round."""
        self._append(self.lines(record))

    def _append(self, lines: Sequence[tuple[Any, ...]]) -> None:
        text = to_csv(lines)
        try:
            with open_to_append(self.path) as file:
                file.write(text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class CsvListener(_Table):
    """Writes ``rounds.csv``: a line is in the file as soon as its round is over.

    Parameters
    ----------
    path
        The file. Lines of other stages stay; those of a stage that starts are replaced by what it
        has done so far, so that a resumed run leaves no line out and none double.
    """

    columns = ROUND_COLUMNS

    def lines(self, record: RoundRecord) -> list[tuple[Any, ...]]:
        """Return the round's one line."""
        return [tuple(values_of(record, ROUND_COLUMNS))]


class FailuresListener(_Table):
    """Writes ``failures.csv``: which client had no usable answer in which round, and why.

    Parameters
    ----------
    path
        The file. Its lines come and go with those of ``rounds.csv``, where ``failures`` counts
        them; without failures it holds its columns only.
    """

    columns = FAILURE_COLUMNS

    def on_personalized(self, stage: str, failures: Mapping[str, str]) -> None:
        """Add one line per client that could not be personalized, with round 0."""
        lines = [FailureLine(stage, 0, name, reason) for name, reason in sorted(failures.items())]
        self._append([tuple(values_of(line, FAILURE_COLUMNS)) for line in lines])

    def lines(self, record: RoundRecord) -> list[tuple[Any, ...]]:
        """Return one line per failed client, sorted by name."""
        lines = (
            FailureLine(record.stage, record.round, client, reason)
            for client, reason in sorted(record.reasons.items())
        )
        return [tuple(values_of(line, FAILURE_COLUMNS)) for line in lines]


class ProgressListener(Listener):
    """Bars: the stages of a study, if it has more than one, and the rounds of the current one.

    Use it as a context manager, so that the terminal is tidy again after an error.

    Parameters
    ----------
    stages
        How many stages there are; None for one, which needs no bar.
    console
        Where to draw. Nothing is drawn if it is neither a terminal nor a notebook.
    """

    def __init__(self, *, console: Console, stages: int | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (console.is_terminal or console.is_jupyter),
            transient=True,
        )
        self._stages = self._bars.add_task(
            "stages", total=stages, note="", visible=stages is not None
        )
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
        what = "rounds" if rounds else "clients"
        if not self._bars.tasks[0].visible:
            what = f"{stage}: {what}"
        self._rounds = self._bars.add_task(what, total=rounds or None, completed=len(done), note="")

    def on_round(self, record: RoundRecord) -> None:
        """Move it and show loss and accuracy."""
        if self._rounds is None:
            return
        note = f"loss {record.loss:.3f}"
        if not math.isnan(record.accuracy):
            note += f"  accuracy {record.accuracy:.3f}"
        if record.failures:
            note += f"  failures {record.failures}"
        total = self._bars.tasks[self._bars.task_ids.index(self._rounds)].total
        # The pass that judges the last state is one more than the rounds.
        self._bars.update(self._rounds, completed=min(record.round, total or 0), note=note)

    def on_client(self, stage: str, done: int, clients: int) -> None:
        """Move it by a client."""
        if self._rounds is not None:
            self._bars.update(self._rounds, completed=done, total=clients)

    def on_end(self, stage: str) -> None:
        """Take the stage's bar away."""
        if self._rounds is not None:
            self._bars.remove_task(self._rounds)
            self._rounds = None
        self._bars.advance(self._stages)


@contextlib.contextmanager
def progress_bar(show: bool = True, *, stages: int | None = None) -> Iterator[list[Listener]]:
    """Yield a :class:`ProgressListener` as the only listener if somebody can see it, else none.

    It is seen where standard error is a terminal, and in a notebook; it needs rich, and in a
    notebook ipywidgets too.

    Parameters
    ----------
    show
        Whether it is wanted.
    stages
        How many stages there are; None for one.
    """
    if not show or importlib.util.find_spec("rich") is None:
        yield []
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        seen = importlib.util.find_spec("ipywidgets") is not None
    else:
        seen = sys.stderr.isatty()
    if not seen:
        yield []
        return
    with ProgressListener(stages=stages, console=console) as bar:
        yield [bar]


_CURVES = tuple(
    name for name in names_of(RoundLine) if name not in ("stage", "round", "clients", "seconds")
)


class TensorBoardListener(Listener):
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
        self._make_writer = functools.partial(SummaryWriter, str(folder))

    @functools.cached_property
    def _writer(self) -> Any:
        # Not before the first stage: until then a run may be refused, and leaves no folder.
        return self._make_writer()

    def on_start(self, stage: str, rounds: int, done: Sequence[RoundRecord]) -> None:
        """Write the rounds before a resumption again: TensorBoard shows the last value."""
        for record in done:
            self.on_round(record)

    def on_round(self, record: RoundRecord) -> None:
        """Write one point per curve."""
        for name in _CURVES:
            self._writer.add_scalar(f"{record.stage}/{name}", getattr(record, name), record.round)

    def on_end(self, stage: str) -> None:
        """Make sure that the files are complete."""
        self._writer.flush()
