"""Speech Commands: every speaker is a client; twelve classes; held-out speakers are unseen.

P. Warden, "Speech Commands", 2018, https://arxiv.org/abs/1804.03209, version 2 (105,829 clips of 35
words), set up as for FedL2P (Lee et al., NeurIPS 2023, section 4): the 250 training speakers with
the most clips are seen, the 50 validation and test speakers with the most are unseen; ten commands,
every other word is "unknown", and "silence", random seconds of the background noise, is added to a
speaker's clips, a tenth of their number. Per class 80/20 into training and test, then the training
part 80/20 into training and validation; a class always keeps a training example.

Training batches are balanced over classes, and every clip of a batch is distorted separately, as a
waveform (:class:`fedl2p.data.audio.distortion.Distort`). So a client has its training clips twice:
as features, for its profile and for evaluation, and as waveforms, from which the features of a
batch are computed when it is drawn, on the device (:mod:`fedl2p.data.audio.filter_banks`).

The clips of the chosen speakers are decoded, cut or padded with zeros to one second, and converted
to features once; both are in one memory-mapped file. So are the seconds of silence, the same under
every seed of a study: the seed decides the splits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.data.audio.clip_cache import open_clips
from fedl2p.data.audio.distortion import Distort
from fedl2p.data.audio.filter_banks import FilterBank
from fedl2p.data.audio.speech_commands import (
    CLASSES,
    Layout,
    problems,
    read_noise,
    scan,
)
from fedl2p.data.files.archives import unpack
from fedl2p.data.files.cache import DecodedExamples
from fedl2p.data.files.downloads import RemoteFile, fetch
from fedl2p.data.files.folders import ProgressCallback, remedy, root_of
from fedl2p.data.pools.partition import label_entropy, stratified_split
from fedl2p.data.population import Population
from fedl2p.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

ARCHIVE = RemoteFile(
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    name="speech_commands_v0.02.tar.gz",
    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)
MAX_BYTES = 6 << 30
"""Most bytes that the archive may unpack to; the published one has 3.4 GB in 105,836 files."""

CLIPS = "clips"
"""Subfolder of a data set's folder, in the layout of the archive."""

ABOUT = "speakers.json"
"""File beside the word folders that describes the speakers; only ``spoken`` has it."""


@dataclass(frozen=True, kw_only=True)
class Speech:
    """Speakers of a folder in the layout of Speech Commands.

    Parameters
    ----------
    root
        Folder of ``clips/``, which has the layout of the archive; None for $FEDL2P_DATA/DATASET or
        data/DATASET.
    dataset
        speech, the published archive, or spoken, which `fedl2p data make spoken` makes.
    seen
        Number of clients: the training speakers with the most clips.
    unseen
        Number of unseen clients: the validation and test speakers with the most clips.
    silence
        Clips of silence per clip of speech.
    balanced
        Whether training batches hold all classes equally often, on average; if not, every training
        example comes once per epoch.
    distort
        Whether training batches are shifted in time and mixed with noise.
    shift_ms
        Largest shift in time, milliseconds to either side.
    noise_probability
        Probability that a training clip gets background noise.
    noise_volume
        Largest factor on that noise.
    features
        The filter bank.
    """

    root: Path | None = None
    dataset: Literal["speech", "spoken"] = "speech"
    seen: int = 250
    unseen: int = 50
    silence: float = 0.1
    balanced: bool = True
    distort: bool = True
    shift_ms: float = 100.0
    noise_probability: float = 0.8
    noise_volume: float = 0.1
    features: FilterBank = field(default_factory=FilterBank)

    def __post_init__(self) -> None:
        if self.dataset not in ("speech", "spoken"):
            raise ValueError(f"dataset must be speech or spoken, got {self.dataset!r}")
        if self.seen < 1 or self.unseen < 0:
            raise ValueError(
                f"seen must be 1 or more and unseen 0 or more, got {self.seen} and {self.unseen}"
            )
        if not 0 <= self.silence <= 10:
            raise ValueError(f"silence must be 0 to 10 clips per clip, got {self.silence}")
        if not 0 <= self.shift_ms < 1000:
            raise ValueError(f"shift_ms must be 0 to below 1000, got {self.shift_ms}")
        for name in ("noise_probability", "noise_volume"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def open(self, seed: int) -> SpeechPopulation:
        """Return the population under a seed; the first call decodes all clips, once.

        Raises
        ------
        ValueError
            If the folder is incomplete, a clip damaged, or there are too few speakers.
        """
        root = root_of(self.dataset, self.root)
        layout = scan(root / CLIPS, remedy=clips_remedy(self.dataset, root))
        seen = _most_clips(layout, self.seen, held_out=False)
        unseen = _most_clips(layout, self.unseen, held_out=True)
        noises = {name: read_noise(layout.folder / name) for name in layout.noises}
        clips = open_clips(
            root / "cache",
            layout,
            speakers=(*seen, *unseen),
            noises=noises,
            silence=self.silence,
            features=self.features,
        )
        return SpeechPopulation(self, seed, layout.folder, seen, unseen, clips, noises)


class SpeechPopulation(Population):
    """The clients of :class:`Speech`, named as their speakers, most clips first."""

    def __init__(
        self,
        source: Speech,
        seed: int,
        folder: Path,
        seen: Sequence[str],
        unseen: Sequence[str],
        clips: DecodedExamples,
        noises: Mapping[str, np.ndarray],
    ) -> None:
        self.source = source
        self.seed = seed
        self.seen, self.unseen = tuple(seen), tuple(unseen)
        self.classes = len(CLASSES)
        self.shape = tuple(clips.x.dtype["features"].shape)
        self._folder = folder
        self._clips = clips
        self._labels = torch.from_numpy(clips.column("label"))
        ends = np.cumsum(clips.column("count")).tolist()
        self._rows = {
            name: (begin, end)
            for name, begin, end in zip(self.names, [0, *ends], ends, strict=False)
        }
        self._distort = Distort(
            source.features,
            torch.from_numpy(np.concatenate(list(noises.values()))),
            tuple(len(noise) for noise in noises.values()),
            shift_ms=source.shift_ms,
            noise_probability=source.noise_probability,
            noise_volume=source.noise_volume,
        )

    def open(self, name: str) -> ClientData:
        """Return a speaker's data: features of shape (n, 1, frames, bins), normalised, float32."""
        train, validation, test = self.rows(name)
        distort = self.source.distort
        return ClientData(
            train=self._examples(train),
            validation=self._examples(validation),
            test=self._examples(test),
            augment=self._distort if distort else None,
            raw=self._read("waveform", train) if distort else None,
            raw_validation=self._read("waveform", validation) if distort else None,
            balanced=self.source.balanced,
        )

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return number of clips, entropy of the labels (nats), and the speaker's description."""
        begin, end = self._span(name)
        entropy = label_entropy(self._labels[begin:end])
        return {
            **self._speakers.get(name, {}),
            "clips": end - begin,
            "label_entropy": round(entropy, 4),
        }

    def rows(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions of a speaker's training, validation and test clips in the cache.

        Raises
        ------
        ValueError
            If the speaker has too few clips for all three.
        """
        begin, end = self._span(name)
        labels = self._labels[begin:end]
        kept, test = stratified_split(labels, (0.8, 0.2), generator=self._generator(name, "test"))
        train, validation = stratified_split(
            labels[kept], (0.8, 0.2), generator=self._generator(name, "validation")
        )
        if not (len(validation) and len(test)):
            raise ValueError(
                f"speaker {name!r} has only {end - begin} clips in {self._folder}, too few of each "
                "word to split into training, validation and test; ask for fewer speakers"
            )
        return begin + kept[train], begin + kept[validation], begin + test

    def _span(self, name: str) -> tuple[int, int]:
        if name not in self._rows:
            raise KeyError(f"there is no client {name!r}; a client has the name of its speaker")
        return self._rows[name]

    def _examples(self, rows: Tensor) -> Examples:
        return Examples(self._read("features", rows), self._labels[rows])

    def _read(self, field: str, rows: Tensor) -> Tensor:
        return torch.from_numpy(self._clips.x[field][rows.numpy()])

    @cached_property
    def _speakers(self) -> Mapping[str, dict[str, str | float]]:
        try:
            content: Any = json.loads((self._folder / ABOUT).read_text(encoding="utf-8"))
            return dict(content["speakers"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # only reports use it, and the published archive has none

    def _generator(self, *parts: str) -> torch.Generator:
        return generator(self.seed, "speech", *parts)


def clips_remedy(dataset: str, root: Path) -> str:
    """Return what to do about an incomplete ``clips/``."""
    return remedy(root / CLIPS, dataset, verb="make" if dataset == "spoken" else "get")


def _most_clips(layout: Layout, count: int, *, held_out: bool) -> list[str]:
    """Return the speakers with the most clips."""
    speakers = layout.ranked(held_out=held_out)
    if len(speakers) < count:
        field, kind = ("unseen", "validation and test") if held_out else ("seen", "training")
        raise ValueError(
            f"{layout.folder} has {len(speakers)} {kind} speakers, but {field} asks for {count}; "
            "ask for fewer"
        )
    return speakers[:count]


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download the archive (2.3 GB), check it, and unpack it as ``clips/``."""
    if not (root / CLIPS).exists():
        archive = fetch(ARCHIVE, root, progress)
        unpack(archive, root / CLIPS, max_bytes=MAX_BYTES, max_files=200_000, progress=progress)
    return []


def check(root: Path) -> list[str]:
    """Return what is missing or damaged among the clips; every file is read."""
    return problems(root / CLIPS, remedy=clips_remedy("speech", root))
