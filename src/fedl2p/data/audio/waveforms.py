"""One-second clips of speech: reading and writing WAV files, and changing clips at random.

Clips are 16 kHz, one channel; in memory and in caches 16-bit integers, as in the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedl2p.data.audio.filter_banks import SAMPLE_RATE, FilterBank

FULL_SCALE = 32768.0

CLIP = SAMPLE_RATE
"""Samples of a clip: one second."""


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
    claimed, there = _claimed_size(path)
    if claimed > there:
        raise ValueError(
            f"{path} is cut off: it should have {claimed} bytes and has {there}; fetch it again"
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


def _claimed_size(path: Path) -> tuple[int, int]:
    """Return the size in bytes that a RIFF file's head claims (0 for other files), and its own.

    The decoder reads what there is of a file that was cut off, without a word.
    """
    with path.open("rb") as file:
        head = file.read(8)
    claimed = int.from_bytes(head[4:], "little") + 8 if head[:4] == b"RIFF" else 0
    return claimed, path.stat().st_size


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write int16 samples, of shape (samples,), as a WAV file of 16 bits, 16 kHz, one channel."""
    import soundfile

    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")


def one_second(samples: np.ndarray) -> np.ndarray:
    """Return the first second; a shorter clip is padded with silence at its end."""
    clip = np.zeros(CLIP, samples.dtype)
    clip[: len(samples)] = samples[:CLIP]
    return clip


def to_float(clips: Tensor) -> Tensor:
    """Return int16 samples as float32, full scale = 1."""
    return clips.to(torch.float32) / FULL_SCALE


@dataclass(frozen=True, eq=False)
class Distort:
    """The augmentation of speech: every clip moved in time and mixed with noise by itself.

    As published for Speech Commands: a time shift, and with some probability a random second of a
    background noise at a random volume. It takes waveforms and returns their features.

    Parameters
    ----------
    features
        From waveforms (n, samples), full scale 1, to the model's inputs.
    noises
        Background noises one after the other, int16, shape (samples,); empty for none. A second
        never spans two of them.
    lengths
        Samples of each noise, at least a second each.
    shift_ms
        Largest shift, milliseconds to either side; what is moved in is silence.
    noise_probability
        Probability that a clip gets noise.
    noise_volume
        Largest factor on the noise; the factor is uniform from 0.
    """

    features: FilterBank
    noises: Tensor
    lengths: tuple[int, ...]
    shift_ms: float = 100.0
    noise_probability: float = 0.8
    noise_volume: float = 0.1

    def __call__(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """Return the features of distorted clips; ``clips`` is int16, of shape (n, samples)."""
        return self.features(self.waveforms(clips, generator))

    def waveforms(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """Return distorted clips, shape (n, samples), float32 in [-1, 1]."""
        n, samples = clips.shape
        # All draws come first and for every clip, whether it uses them or not: the draws of one
        # clip do not depend on what befell the others.
        most = round(self.shift_ms * SAMPLE_RATE / 1000)
        shift = torch.randint(-most, most + 1, (n,), generator=generator)
        chance, volume, which, where = torch.rand(4, n, generator=generator, dtype=torch.float64)
        moved = _shifted(to_float(clips), shift.to(clips.device), most)
        if not self.lengths or self.noise_volume == 0:
            return moved
        factor = self.noise_volume * volume * (chance < self.noise_probability)
        noise = to_float(self._cuts(samples, which, where).to(clips.device))
        factor = factor.to(clips.device, torch.float32)
        return noise.mul_(factor[:, None]).add_(moved).clamp_(-1, 1)

    def _cuts(self, samples: int, which: Tensor, where: Tensor) -> Tensor:
        """Return one random cut of a noise per clip; every noise is as likely."""
        lengths = torch.tensor(self.lengths)
        chosen = (which * len(lengths)).long()
        begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])[chosen]
        begins = begins + (where * (lengths[chosen] - samples + 1)).long()
        return self.noises.unfold(0, samples, 1)[begins]


def _shifted(x: Tensor, shift: Tensor, most: int) -> Tensor:
    """Move each row of (n, samples) to the right by its own number of samples, at most ``most``."""
    padded = torch.nn.functional.pad(x, (most, most))
    rows = torch.arange(len(x), device=x.device)
    return padded.unfold(1, x.shape[1], 1)[rows, most - shift]
