"""The folder that a run writes: whose it is, one process at a time, and its log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar, cast

from fedl2p.atomic_files import open_to_append, refuse_special_files, remove_unfinished
from fedl2p.runs import layout
from fedl2p.runs.config import MADE_BY, differences, read_config, with_absolute_paths
from fedl2p.runs.files import write_atomically
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.validation import from_plain, to_plain
from fedl2p.version import __version__

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunWriter:
    """One run's folder. Other tools read its files: their names and fields stay as they are."""

    path: Path

    def check(self, study: object, *, resume: bool) -> None:
        """Refuse a folder that holds a run, unless it is this study's and may be resumed.

        Parameters
        ----------
        study
            The resolved study, a dataclass of settings.
        resume
            Whether the folder may already hold this study; if it holds nothing, the run starts.

        Raises
        ------
        ValueError
            If it holds a run and ``resume`` is not set, or holds a run of another study or of
            another version of this package, or a symbolic link.
        """
        given = _stored_form(study)
        for name in (*layout.CONTENT, layout.LOG, layout.LOCK, layout.EXPLAIN, layout.TENSORBOARD):
            refuse_special_files(self.path / name)
        if not self.holds_run():
            return
        if not resume:
            raise ValueError(
                f"{self.path} already holds a run; give another folder, or go on with that one "
                "by --resume"
            )
        self._check_same(given)

    @contextlib.contextmanager
    def running(self, study: object, population: PopulationInfo) -> Iterator[None]:
        """Hold the folder while the block runs: locked, described, and with a log.

        Errors as of :meth:`lock` and :meth:`describe`.
        """
        with self.lock():
            self.describe(study, population)
            with self.logging():
                self._log_other_versions()
                yield

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder, and keep other processes from running in it while the block runs.

        Raises
        ------
        ValueError
            If another process runs in it, or it cannot be written.
        """
        try:
            import filelock
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "filelock, which keeps two processes out of one folder, is not installed; "
                "pip install 'fedl2p[runs]'",
                name=error.name,
            ) from error
        lock = filelock.FileLock(self.path / layout.LOCK, thread_local=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"another process runs in {self.path}; wait for it, or give another folder"
            ) from None
        except OSError as problem:
            raise self._not_writable(problem) from None
        try:
            yield
        finally:
            lock.release()

    def describe(self, study: object, population: PopulationInfo) -> None:
        """Write config.json, unless the folder holds a run, and population.json.

        Paths are stored absolute, so that the run can be resumed from another working folder.

        Raises
        ------
        ValueError
            If the folder cannot be written.
        OSError
            If there is no room for population.json.
        """
        for name in (*layout.CONTENT, layout.EXPLAIN):
            remove_unfinished(self.path / name)
        if not self.holds_run():
            content = {MADE_BY: versions(), **to_plain(with_absolute_paths(study))}
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                text = json.dumps(content, indent=2) + "\n"
                write_atomically(self.path / layout.CONFIG, text)
            except OSError as problem:
                raise self._not_writable(problem) from None
        population.write(self.path)

    def holds_run(self) -> bool:
        """Tell whether any file of a run is there."""
        return any((self.path / name).exists() for name in layout.CONTENT)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Append what the package logs to log.txt while the block runs.

        Where the environment variable FEDL2P_LOG is ``json``, to log.jsonl, as a JSON object per
        line with the keys time (ISO 8601, UTC), level, logger, message and, of an error, traceback.

        Raises
        ------
        ValueError
            If FEDL2P_LOG is neither that nor ``text``.
        """
        form = os.environ.get("FEDL2P_LOG") or "text"
        if form not in ("text", "json"):
            raise ValueError(f"FEDL2P_LOG is {form!r}, but must be text or json")
        logger = logging.getLogger("fedl2p")
        handler = _LogFile(self.path / (layout.LOG_JSON if form == "json" else layout.LOG))
        handler.setFormatter(
            _JsonLine()
            if form == "json"
            else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(min(level or logging.INFO, logging.INFO))
        try:
            yield
        except BaseException:
            logger.exception("stopped")
            raise
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            handler.close()

    def _log_other_versions(self) -> None:
        """Say in the log which packages have changed since the run was started."""
        _, before = read_config(self.path / layout.CONFIG)
        for package, version in versions().items():
            if before.get(package, version) != version:
                log.warning(
                    "the run was started with %s %s and goes on with %s; last digits may differ",
                    *(package, before[package], version),
                )

    def _check_same(self, study: object) -> None:
        plain, made_by = read_config(self.path / layout.CONFIG)
        version = made_by.get("fedl2p", "of a version before 0.1")
        if version != __version__:
            raise ValueError(
                f"{self.path} holds a run that fedl2p {version} started, and this is {__version__};"
                " resume with that version, or give another folder"
            )
        different = differences(from_plain(type(study), plain), study)
        if different:
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise ValueError(
                f"{self.path} holds a run of other settings (there and here): "
                f"{'; '.join(different[:3])}{more}; resume with the same settings, or give another "
                "folder"
            )

    def _not_writable(self, problem: OSError) -> ValueError:
        return ValueError(
            f"cannot write into {self.path} ({problem.strerror}); give another folder"
        )


def _stored_form(study: T) -> T:
    """Return a study as it comes back from its file; refuse one with a value of a wrong type."""
    return from_plain(type(study), to_plain(with_absolute_paths(study)))


class _JsonLine(logging.Formatter):
    """A record as one line of JSON, for programs that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _LogFile(logging.FileHandler):
    """A log that a full disk leaves incomplete; what fails for the same reason says so."""

    def _open(self) -> TextIOWrapper:
        return cast(TextIOWrapper, open_to_append(Path(self.baseFilename)))

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: the usual traceback on stderr would bury the error itself."""

    def close(self) -> None:
        """Close the file, with what there is room for."""
        with contextlib.suppress(OSError):
            super().close()


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, and the packages that results depend on."""
    found = {"fedl2p": __version__, "python": platform.python_version()}
    for package in ("torch", "flwr", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
