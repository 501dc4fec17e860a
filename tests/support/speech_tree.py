"""A small folder in the layout of Speech Commands, written with soundfile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile

from fedl2p.data.audio.speech_commands import COMMANDS

RATE = 16_000
WORDS = (*COMMANDS, "bed", "cat")


def tone(hertz: float, *, seconds: float = 1.0, volume: float = 0.3) -> np.ndarray:
    return volume * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


def write(path: Path, samples: np.ndarray, *, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="PCM_16")


def write_tree(
    folder: Path,
    *,
    training: Mapping[str, int],
    validation: Mapping[str, int] | None = None,
    testing: Mapping[str, int] | None = None,
) -> None:
    """Write clips: by speaker, how many of each word; a word is a tone of its own."""
    rng = np.random.default_rng(0)
    lists = {"validation_list.txt": validation or {}, "testing_list.txt": testing or {}}
    for speaker, times in {**training, **(validation or {}), **(testing or {})}.items():
        for k, word in enumerate(WORDS):
            for i in range(times):
                clip = tone(300 + 150 * k) + 0.01 * rng.standard_normal(RATE)
                write(folder / word / f"{speaker}_nohash_{i}.wav", clip)
    for name, speakers in lists.items():
        lines = [
            f"{word}/{speaker}_nohash_{i}.wav\n"
            for speaker, times in speakers.items()
            for word in WORDS
            for i in range(times)
        ]
        (folder / name).write_text("".join(lines))
    for kind, volume in (("hiss", 0.2), ("rumble", 0.5)):
        noise = volume * np.clip(rng.standard_normal(3 * RATE) / 4, -1, 1)
        write(folder / "_background_noise_" / f"{kind}.wav", noise)
