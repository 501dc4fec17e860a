"""Smartwatch recordings of physiotherapy exercises: a client is one arm of one person.

140 series of acceleration (x, y, z) and angular velocity (x, y, z) at 50 Hz: 10 people, both arms,
7 shoulder exercises (D. Burns et al. 2018, "Shoulder physiotherapy exercise recognition: machine
learning the inertial signals from a smartwatch", Physiological Measurement 39; BSD licence). They
are part of the PyPI package ``seglearn``, whose file is read; the package is not imported.

Each series is cut in time into a training, a validation and a test part, and each part into windows
of two seconds that overlap by half. No moment is in two parts. People are drawn at random to be
unseen, with both arms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedl2p.data.files.plain_pickle import load_plain
from fedl2p.data.pools.client_indices import PARTS, ClientIndices, check_counts
from fedl2p.data.pools.shared_pool import SharedPool
from fedl2p.seeds import generator

NAME = "watch"
FILE = Path("data", "watch_dataset.npy")
MAX_BYTES = 64 << 20
"""Most bytes of the file that are read; the published one has 18 MB."""

CLASSES = 7
CHANNELS = 6
WINDOW, STEP = 100, 50  # values: 2 and 1 seconds
SHARES = (0.4, 0.2, 0.4)  # of training, validation and test
ARMS = ("left", "right")

# Of each channel, over all series.
MEAN = (-0.0076, 0.3794, -0.1470, 0.0253, -0.0015, 0.0118)
SD = (0.9033, 0.4936, 0.5381, 0.9817, 2.4961, 1.0522)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Arms of people as clients.

    Parameters
    ----------
    path
        The file watch_dataset.npy; None for that of the installed package seglearn.
    unseen
        Number of people whose arms only come afterwards.
    """

    path: Path | None = None
    unseen: int = 3

    def __post_init__(self) -> None:
        check_counts(self, at_least_one=(), or_none="unseen")

    def open(self, seed: int) -> SharedPool:
        """Return the population under a seed.

        Raises
        ------
        ValueError
            If the file is missing or damaged, or has too few people.
        """
        path = installed_file() if self.path is None else self.path
        series = read_series(path)
        people = sorted({one.person for one in series})
        if self.unseen >= len(people):
            raise ValueError(
                f"unseen is {self.unseen}, but {path} has {len(people)} people, of whom one must "
                "be seen; use fewer"
            )
        order = torch.randperm(len(people), generator=generator(seed, NAME, "people")).tolist()
        hidden = {people[i] for i in order[: self.unseen]}
        windows = _Windows()
        clients: dict[bool, dict[str, ClientIndices]] = {False: {}, True: {}}
        width = len(str(people[-1]))
        for person in people:
            for arm in ARMS:
                own = [one for one in series if (one.person, one.arm) == (person, arm)]
                if own:
                    name = f"person-{person:0{width}d}-{arm}"
                    clients[person in hidden][name] = windows.add(own)
        return SharedPool(
            np.concatenate(windows.x),
            torch.tensor(windows.labels),
            seen=clients[False],
            unseen=clients[True],
            classes=CLASSES,
            prepare=standardise,
        )


@dataclass(frozen=True, kw_only=True)
class Series:
    """One exercise of one arm: values of shape (time, 6), float32."""

    values: np.ndarray
    label: int
    person: int
    arm: str


class _Windows:
    """All windows, shape (6, 100) each, with their labels."""

    def __init__(self) -> None:
        self.x: list[np.ndarray] = []
        self.labels: list[int] = []

    def add(self, series: list[Series]) -> ClientIndices:
        """Cut a client's series; return the positions of the windows by part."""
        positions: dict[str, list[int]] = {part: [] for part in PARTS}
        for one in series:
            cuts = np.cumsum([0, *SHARES]) * len(one.values)
            for part, begin, end in zip(PARTS, cuts[:-1], cuts[1:], strict=True):
                piece = one.values[round(begin) : round(end)]
                cut = np.lib.stride_tricks.sliding_window_view(piece, WINDOW, axis=0)[::STEP]
                positions[part] += range(len(self.labels), len(self.labels) + len(cut))
                self.x.append(cut)
                self.labels += [one.label] * len(cut)
        train, validation, test = (torch.tensor(positions[part]) for part in PARTS)
        about: dict[str, str | float] = {"arm": series[0].arm, "person": series[0].person}
        return ClientIndices(train=train, validation=validation, test=test, about=about)


def standardise(windows: np.ndarray) -> torch.Tensor:
    """Return windows (n, 6, 100) with each channel scaled to mean 0 and variance 1, float32."""
    x = torch.from_numpy(np.array(windows, dtype=np.float32))
    return x.sub_(torch.tensor(MEAN)[:, None]).div_(torch.tensor(SD)[:, None])


def installed_file() -> Path:
    """Return the file in the installed package; importing the package would take seconds.

    Raises
    ------
    ValueError
        If seglearn is not installed.
    """
    package = find_spec("seglearn")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "the smartwatch recordings come with seglearn, which is not installed; pip install "
            "'fedl2p[watch]'"
        )
    return Path(package.submodule_search_locations[0], FILE)


def read_series(path: Path) -> tuple[Series, ...]:
    """Return the series in a file of seglearn's format.

    Raises
    ------
    ValueError
        If it is missing, too large, damaged, or not of that format.
    """
    try:
        status = path.stat()
    except OSError as problem:
        raise ValueError(
            f"cannot read {path} ({problem.strerror}); install seglearn again, or name its "
            "watch_dataset.npy"
        ) from None
    if status.st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {status.st_size} bytes, but at most {MAX_BYTES} are read; name seglearn's "
            "watch_dataset.npy"
        )
    return _read(path, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(path: Path, changed: int) -> tuple[Series, ...]:
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        except Exception as problem:  # a damaged header may raise anything
            raise _unfit(path, f"it is no .npy file: {problem}") from None
        # numpy writes objects as a pickle, which it would execute.
        content = load_plain(file.read(), source=str(path))
    try:
        (fields,) = content
        columns = [fields[name] for name in ("X", "y", "subject", "side")]
        return tuple(_series(*row) for row in zip(*columns, strict=True))
    except (ValueError, TypeError, KeyError, OverflowError) as problem:
        raise _unfit(path, str(problem)) from None


def _series(values: Any, label: Any, person: Any, side: Any) -> Series:
    x = np.asarray(values, dtype=np.float32)
    shortest = round(WINDOW / min(SHARES)) + len(SHARES)
    if x.ndim != 2 or x.shape[1] != CHANNELS or len(x) < shortest or not np.isfinite(x).all():
        raise ValueError(
            f"a series is of shape {x.shape}, but must be finite, of shape (time, {CHANNELS}) with "
            f"{shortest} values or more"
        )
    if label not in range(CLASSES) or side not in (0, 1) or person not in range(1000):
        raise ValueError(f"a series is of exercise {label}, person {person} and side {side}")
    return Series(values=x, label=int(label), person=int(person), arm=ARMS[int(side)])


def _unfit(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} does not hold seglearn's series ({' '.join(why.split())[:200]}); install "
        "seglearn again"
    )
