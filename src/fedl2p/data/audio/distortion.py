"""Augmentation of speech: random shifts in time and background noise, as published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedl2p.data.audio.filter_banks import SAMPLE_RATE, FilterBank
from fedl2p.data.audio.wav_files import to_float

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Distort:
    """Shifts every clip in time, mixes it with noise, and computes the features.

    As published for Speech Commands: a random time shift and, with some probability, a random
    second of a background noise at a random volume.

    Parameters
    ----------
    features
        The filter bank, from waveforms (n, samples), full scale 1, to the model's inputs.
    noises
        Concatenated background noises, int16, shape (samples,); empty for none. No cut spans two
        of them.
    lengths
        Samples of each noise, at least a second each.
    shift_ms
        Largest shift, milliseconds to either side; the gap is filled with zeros.
    noise_probability
        Probability that a clip gets noise.
    noise_volume
        Largest factor of the noise; the factor is uniform from 0.
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
        # All draws come first and for every clip, used or not: the draws of one clip do not depend
        # on those of the others.
        most = round(self.shift_ms * SAMPLE_RATE / 1000)
        shift = torch.randint(-most, most + 1, (n,), generator=generator)
        chance, volume, which, begin = torch.rand(4, n, generator=generator, dtype=torch.float64)
        shifted = _shift(to_float(clips), shift.to(clips.device), most)
        if not self.lengths or self.noise_volume == 0:
            return shifted
        factor = self.noise_volume * volume * (chance < self.noise_probability)
        noise = to_float(self._cut(samples, which, begin).to(clips.device))
        factor = factor.to(clips.device, torch.float32)
        return noise.mul_(factor[:, None]).add_(shifted).clamp_(-1, 1)

    def _cut(self, samples: int, which: Tensor, begin: Tensor) -> Tensor:
        """Return a cut of a noise per clip; ``which`` and ``begin`` are uniform in [0, 1)."""
        lengths = torch.tensor(self.lengths)
        chosen = (which * len(lengths)).long()
        begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])[chosen]
        begins = begins + (begin * (lengths[chosen] - samples + 1)).long()
        return self.noises.unfold(0, samples, 1)[begins]


def _shift(x: Tensor, shift: Tensor, most: int) -> Tensor:
    """Shift row i of (n, samples) to the right by ``shift[i]`` samples, at most ``most``."""
    padded = torch.nn.functional.pad(x, (most, most))
    rows = torch.arange(len(x), device=x.device)
    return padded.unfold(1, x.shape[1], 1)[rows, most - shift]
