"""Layout of the Speech Commands archive: word folders, two lists, background noise.

P. Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", 2018,
https://arxiv.org/abs/1804.03209. In the folder lie::

    yes/SPEAKER_nohash_0.wav ...     one folder per word; SPEAKER is one person in all of them
    _background_noise_/*.wav         longer recordings without speech
    validation_list.txt              clips of the validation speakers, one word/file a line
    testing_list.txt                 clips of the test speakers

A speaker in neither list is a training speaker. Clips are about a second, 16 kHz, 16 bits, mono.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedl2p.data.audio.filter_banks import SAMPLE_RATE
from fedl2p.data.audio.wav_files import CLIP, read_wav

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The words of the first ten classes."""

CLASSES = (*COMMANDS, "unknown", "silence")
"""The twelve classes: every other word is ``unknown``; ``silence`` is background noise."""

NOISE = "_background_noise_"
LISTS = ("validation_list.txt", "testing_list.txt")

_NAME = re.compile(r"(?P<speaker>.+)_nohash_\d+\.wav")

# Damaged clips that `data check` lists one by one; a folder on a broken disk may have thousands.
LISTED = 20


@dataclass(frozen=True)
class Layout:
    """The speakers and clips in a folder of speech commands.

    Parameters
    ----------
    folder
        The folder of the word folders.
    clips
        By speaker, the paths of the clips in the folder, ``word/file``, sorted.
    held_out
        Speakers with a clip in the validation or test list. All their clips are held out, also one
        that no list names: no speaker is in training and test.
    noises
        Paths of the background noises in the folder, sorted.
    """

    folder: Path
    clips: Mapping[str, tuple[str, ...]]
    held_out: frozenset[str]
    noises: tuple[str, ...]

    def ranked(self, *, held_out: bool) -> list[str]:
        """Return the (held out) speakers, those with the most clips first, ties by name."""
        speakers = [s for s in self.clips if (s in self.held_out) == held_out]
        return sorted(speakers, key=lambda speaker: (-len(self.clips[speaker]), speaker))


def class_of(clip: str) -> int:
    """Return the class of a clip ``word/file``."""
    word = clip.partition("/")[0]
    return CLASSES.index(word if word in COMMANDS else "unknown")


def scan(folder: Path, *, remedy: str) -> Layout:
    """Read the names in a folder of speech commands; no clip is opened.

    Parameters
    ----------
    folder
        The folder of the word folders.
    remedy
        Advice for the message about a missing part, e.g. "fetch the archive again".

    Raises
    ------
    ValueError
        If a part of the layout is missing or a file is not named as in the archive; one line.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; {remedy}")
    words = _word_folders(folder)
    for command in COMMANDS:
        if not words.get(command):
            raise ValueError(f"{folder / command} has no clips of the command; {remedy}")
    if not set(words) - set(COMMANDS):
        raise ValueError(
            f"{folder} has no folder of another word, so the class unknown is empty; {remedy}"
        )
    clips: dict[str, list[str]] = {}
    for word, files in words.items():
        for file in files:
            clips.setdefault(_speaker(folder / word, file), []).append(f"{word}/{file}")
    known = {clip for files in clips.values() for clip in files}
    listed = [clip for name in LISTS for clip in _listed(folder / name, known, remedy)]
    noises = sorted(p.name for p in (folder / NOISE).glob("*.wav"))
    if not noises:
        raise ValueError(f"{folder / NOISE} has no WAV files, from which silence is cut; {remedy}")
    return Layout(
        folder=folder,
        clips={speaker: tuple(sorted(files)) for speaker, files in sorted(clips.items())},
        held_out=frozenset(_speaker(folder, clip.partition("/")[2]) for clip in listed),
        noises=tuple(f"{NOISE}/{name}" for name in noises),
    )


def read_noise(path: Path) -> np.ndarray:
    """Return the samples of a background noise, as ``read_wav``; at least 1 s."""
    noise = read_wav(path)
    if len(noise) < CLIP:
        raise ValueError(
            f"{path} is {len(noise) / SAMPLE_RATE:.2f} s long, but background noise must have at "
            "least 1 s; remove it, or fetch it again"
        )
    return noise


def problems(folder: Path, *, remedy: str) -> list[str]:
    """Return what is missing or damaged, one line each; every file is read."""
    try:
        layout = scan(folder, remedy=remedy)
    except ValueError as problem:
        return [str(problem)]
    lines: list[str] = []
    files = [(clip, read_wav) for clips in layout.clips.values() for clip in clips]
    for name, read in [*files, *((noise, read_noise) for noise in layout.noises)]:
        try:
            read(folder / name)
        except ValueError as problem:
            lines.append(str(problem))
    if len(lines) > LISTED:
        lines[LISTED:] = [f"{folder} has {len(lines) - LISTED} further files like these; {remedy}"]
    return lines


def _word_folders(folder: Path) -> dict[str, list[str]]:
    """Return the names of the WAV files in each word folder."""
    words = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir() and not entry.name.startswith(("_", ".")):
            files = [file for file in os.listdir(entry) if file.endswith(".wav")]
            if files:
                words[entry.name] = sorted(files)
    return words


def _speaker(folder: Path, file: str) -> str:
    match = _NAME.fullmatch(file)
    if match is None:
        raise ValueError(
            f"{folder / file} is not named SPEAKER_nohash_NUMBER.wav, so that its speaker is "
            "unknown; rename or remove it"
        )
    return match["speaker"]


def _listed(path: Path, known: set[str], remedy: str) -> list[str]:
    """Return the clips that a list names."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, which lists unseen speakers; {remedy}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} cannot be read ({problem}); {remedy}") from None
    clips = [line.strip() for line in lines if line.strip()]
    for number, clip in enumerate(clips, 1):
        if clip not in known:
            raise ValueError(f"{path}, entry {number}: {clip!r} is not in the folder; {remedy}")
    return clips
