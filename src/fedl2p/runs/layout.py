"""The folder that a run writes: whose it is, its log, its tensors."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedl2p.atomic_files import remove_unfinished
from fedl2p.data.population import Population
from fedl2p.runs.config import differences, from_plain, to_plain
from fedl2p.runs.files import MADE_BY, read_config, write_atomically
from fedl2p.version import __version__

log = logging.getLogger(__name__)

OURS = (
    "config.json",
    "population.json",
    "results.json",
    "clients.csv",
    "rounds.csv",
    "failures.csv",
    "report.html",
    "global.safetensors",
    "metanets.safetensors",
    "metanets.json",
    "checkpoint",
    "clients",
)
"""Names in a run folder, but for log.txt: a folder that holds one of them holds a run."""


@dataclass(frozen=True)
class RunDir:
    """One run's folder. Other tools read its files: their names and fields stay as they are."""

    path: Path

    def file(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.path / name

    def claim(self, study: object, *, resume: bool) -> None:
        """Make the folder, or check that it holds this very study, and write config.json.

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
            another version of this package, or cannot be written. Nothing is changed then.
        """
        if self.holds_run():
            if not resume:
                raise ValueError(
                    f"{self.path} already holds a run; give another folder, or go on with that one "
                    "by --resume"
                )
            self._check_same(study)
            remove_unfinished(self.path)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = {MADE_BY: versions(), **to_plain(study)}
            write_atomically(self.file("config.json"), json.dumps(content, indent=2) + "\n")
        except OSError as problem:
            raise ValueError(
                f"cannot write into {self.path} ({problem.strerror}); give another folder"
            ) from None

    def holds_run(self) -> bool:
        """Tell whether any file of a run is there."""
        return any(self.file(name).exists() for name in OURS)

    def log_other_versions(self) -> None:
        """Say in the log which packages have changed since the run was started."""
        _, there = read_config(self.file("config.json"))
        for package, here in versions().items():
            if there.get(package, here) != here:
                log.warning(
                    "the run was started with %s %s and goes on with %s; last digits may differ",
                    *(package, there[package], here),
                )

    def describe_population(self, population: Population) -> None:
        """Write population.json: who the clients are and what is known of each."""
        clients = {
            name: {
                "pool": "seen" if name in population.seen else "unseen",
                "about": dict(population.about(name)),
            }
            for name in population.names
        }
        content = {
            "classes": population.classes,
            "shape": list(population.shape),
            "clients": clients,
        }
        write_atomically(
            self.file("population.json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Append what the package logs to log.txt while the block runs."""
        logger = logging.getLogger("fedl2p")
        handler = _LogFile(self.file("log.txt"), encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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

    def _check_same(self, study: object) -> None:
        plain, made_by = read_config(self.file("config.json"))
        there = made_by.get("fedl2p", "of a version before 0.1")
        if there != __version__:
            raise ValueError(
                f"{self.path} holds a run that fedl2p {there} started, and this is {__version__}; "
                "resume with that version, or give another folder"
            )
        stored = from_plain(type(study), plain)
        different = differences(stored, study)
        if different:
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise ValueError(
                f"{self.path} holds a run of other settings (there and here): "
                f"{'; '.join(different[:3])}{more}; resume with the same settings, or give another "
                "folder"
            )


class _LogFile(logging.FileHandler):
    """A log that a full disk leaves incomplete; what fails for the same reason says so."""

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


def load_tensors(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises
    ------
    ValueError
        If the file is missing or damaged, or a tensor holds NaN or infinity.
    """
    try:
        tensors = load_file(path, device=str(device))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give a safetensors file of weights") from None
    # A name for a dtype or a device that torch does not have raises what it likes.
    except (OSError, SafetensorError, AttributeError, KeyError, RuntimeError, TypeError) as problem:
        raise ValueError(f"{path} is not a readable safetensors file ({problem})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{path}: tensor {name!r} holds NaN or infinity; give weights that are finite"
            )
    return tensors
