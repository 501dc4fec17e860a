"""The folder that a run writes: whose it is, its log, its tensors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedl2p.config import differences, from_plain, to_plain
from fedl2p.data.population import Population
from fedl2p.reporting.files import read_json, write_atomically

OURS = (
    "config.json",
    "population.json",
    "results.json",
    "clients.csv",
    "rounds.csv",
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
            If it holds a run and ``resume`` is not set, or holds a run of another study, or cannot
            be written. Nothing is changed then.
        """
        if self.holds_run():
            if not resume:
                raise ValueError(
                    f"{self.path} already holds a run; give another folder, or go on with that one "
                    "by --resume"
                )
            self._check_same(study)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file("config.json"), json.dumps(to_plain(study), indent=2) + "\n")
        except OSError as problem:
            raise ValueError(
                f"cannot write into {self.path} ({problem.strerror}); give another folder"
            ) from None

    def holds_run(self) -> bool:
        """Tell whether any file of a run is there."""
        return any(self.file(name).exists() for name in OURS)

    def config(self) -> dict[str, Any]:
        """Return config.json, the resolved study as plain values."""
        return read_json(self.file("config.json"))

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
        handler = logging.FileHandler(self.file("log.txt"), encoding="utf-8")
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
        stored = from_plain(type(study), self.config())
        different = differences(stored, study)
        if different:
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise ValueError(
                f"{self.path} holds a run of other settings (there and here): "
                f"{'; '.join(different[:3])}{more}; resume with the same settings, or give another "
                "folder"
            )


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, atomically, on the CPU."""
    temporary = path.with_name(f".{path.name}.tmp")
    # Tensors that share memory (tied weights) cannot be written as one; each gets its own copy.
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, path)


def load_tensors(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises
    ------
    ValueError
        If the file is missing or damaged.
    """
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give a safetensors file of weights") from None
    except (OSError, SafetensorError) as problem:
        raise ValueError(f"{path} is not a readable safetensors file ({problem})") from None
