"""WAV files of speech: 16 kHz, one channel, 16 bits; one-second clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedl2p.data.audio.filter_banks import SAMPLE_RATE

if TYPE_CHECKING:
    from torch import Tensor

FULL_SCALE = 32768.0

CLIP = SAMPLE_RATE
"""Samples of a clip, one second."""


def read_wav(path: Path) -> np.ndarray:
    """Return the samples of a WAV file, 16-bit.

    Returns
    -------
    numpy.ndarray
        Shape (samples,), int16.

    Raises
    ------
    ValueError
        If the file is missing, no WAV file, cut off, empty, of another rate or of several channels;
        one line that names it and says what to do.
    ModuleNotFoundError
        If soundfile is not installed.
    """
    import soundfile

    if not path.is_file():
        raise ValueError(f"{path} is missing; put it back, or take its name out of the list")
    expected, size = _expected_size(path), path.stat().st_size
    if expected > size:  # the decoder would read a part without an error
        raise ValueError(
            f"{path} is cut off: it should have {expected} bytes and has {size}; fetch it again"
        )
    try:
        samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        why = " ".join(str(error).rpartition(": ")[2].split())
        raise ValueError(
            f"{path} is not a readable WAV file ({why}); fetch it again, or remove it"
        ) from None
    if rate != SAMPLE_RATE:
        raise ValueError(
            f"{path} has {rate} samples per second, but must have {SAMPLE_RATE}; convert it "
            f"(e.g. sox IN -r {SAMPLE_RATE} OUT)"
        )
    if samples.shape[1] != 1:
        raise ValueError(f"{path} has {samples.shape[1]} channels, but must have 1; mix it down")
    if not len(samples):
        raise ValueError(f"{path} has no samples; remove it, or fetch it again")
    mono: np.ndarray = samples[:, 0]
    return mono


def _expected_size(path: Path) -> int:
    """Return the size in bytes according to a RIFF file's header; 0 for other files."""
    with path.open("rb") as file:
        header = file.read(8)
    return int.from_bytes(header[4:], "little") + 8 if header[:4] == b"RIFF" else 0


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write int16 samples, of shape (samples,), as a WAV file of 16 bits, 16 kHz, one channel."""
    import soundfile

    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")


def one_second(samples: np.ndarray) -> np.ndarray:
    """Return the first second; a shorter clip is padded with zeros at its end."""
    clip = np.zeros(CLIP, samples.dtype)
    clip[: len(samples)] = samples[:CLIP]
    return clip


def to_float(clips: Tensor) -> Tensor:
    """Convert int16 samples to float32, full scale = 1."""
    return clips.to(torch.float32) / FULL_SCALE
