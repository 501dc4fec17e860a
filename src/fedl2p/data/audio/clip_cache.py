"""Cache of decoded speech: one-second waveforms and their features, by speaker."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedl2p.data.audio.filter_banks import FilterBank
from fedl2p.data.audio.speech_commands import CLASSES, Layout, class_of
from fedl2p.data.audio.wav_files import CLIP, one_second, read_wav, to_float
from fedl2p.data.files.cache import Allocate, Columns, DecodedExamples, open_cache
from fedl2p.seeds import generator

SILENCE = CLASSES.index("silence")

# Clips per call of the filter bank while a cache is built; more only takes more memory.
CHUNK = 128


def open_clips(
    folder: Path,
    layout: Layout,
    *,
    speakers: Sequence[str],
    noises: Mapping[str, np.ndarray],
    silence: float,
    features: FilterBank,
) -> DecodedExamples:
    """Return waveforms and features of the speakers' clips, decoded at the first call.

    Parameters
    ----------
    folder
        The folder of all caches.
    layout
        The source files.
    speakers
        The speakers, in the order of the result.
    noises
        Samples of every background noise, by name.
    silence
        Clips of silence per clip of speech.
    features
        The filter bank.

    Returns
    -------
    DecodedExamples
        Records of ``waveform`` and ``features``: per speaker the clips in the order of their names,
        then the silence. Columns: ``label``, of each record, and ``count``, of each speaker.
    """

    def build(allocate: Allocate) -> Columns:
        counts = [len(layout.clips[s]) for s in speakers]
        silences = [round(silence * count) for count in counts]
        shape = tuple(features(torch.zeros(CLIP)).shape)
        record = np.dtype([("waveform", "<i2", (CLIP,)), ("features", "<f4", shape)])
        out = allocate((sum(counts) + sum(silences),), record)
        labels: list[int] = []
        for speaker, count in zip(speakers, silences, strict=True):
            begin = len(labels)
            for clip in layout.clips[speaker]:
                out["waveform"][len(labels)] = one_second(read_wav(layout.folder / clip))
                labels.append(class_of(clip))
            for cut in _silence(speaker, count, list(noises.values())):
                out["waveform"][len(labels)] = cut
                labels.append(SILENCE)
            for first in range(begin, len(labels), CHUNK):
                rows = slice(first, min(first + CHUNK, len(labels)))
                clips = torch.from_numpy(np.array(out["waveform"][rows]))
                out["features"][rows] = features(to_float(clips)).numpy()
        return {"label": labels, "count": [a + b for a, b in zip(counts, silences, strict=True)]}

    settings = dataclasses.asdict(features)
    return open_cache(
        folder / "-".join(f"{value:g}" for value in settings.values()),
        key={
            "speakers": list(speakers),
            "silence": silence,
            "features": settings,
            "files": _fingerprint(layout, speakers),
        },
        build=build,
    )


def _silence(speaker: str, count: int, noises: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cut seconds of silence for a speaker, uniformly from all seconds of all noises."""
    rng = generator("speech", "silence", speaker)
    begins = torch.tensor([float(len(noise) - CLIP + 1) for noise in noises])
    cuts = []
    for _ in range(count):
        noise = noises[int(torch.multinomial(begins, 1, generator=rng))]
        begin = int(torch.randint(len(noise) - CLIP + 1, (), generator=rng))
        cuts.append(noise[begin : begin + CLIP])
    return cuts


def _fingerprint(layout: Layout, speakers: Sequence[str]) -> str:
    """Return a digest of name, size and modification time of all source files of the cache."""
    digest = hashlib.sha256()
    for name in [*layout.noises, *(clip for s in speakers for clip in layout.clips[s])]:
        stat = (layout.folder / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
