"""Words synthesized by the command espeak-ng, which Debian and other systems package.

A voice is an accent of English with a variant, espeak-ng's word for the properties of the throat:
pitch range, formants, breath, roughness. Every word is one call of the command, and its sound
depends on the arguments alone.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from fedl2p.data.audio.filter_banks import SAMPLE_RATE

ACCENTS = (
    *("en-gb", "en-us", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd"),
    *("en-029", "en-us-nyc"),
)

VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"),
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique"),
    *("Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Nguyen", "RicishayMax"),
    *("Storm", "Tweaky", "adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris"),
    *("caleb", "croak", "david", "ed", "edward", "grandma", "grandpa", "gustave", "iven", "iven2"),
    *("john", "kaukovalta", "klatt", "klatt2", "klatt3", "klatt4", "linda", "marcelo", "max"),
    *("michel", "miguel", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert"),
    *("sandro", "shelby", "steph", "travis", "victor", "whisper", "whisperf", "zac"),
)
"""Variants of espeak-ng 1.51 that sound human; robots and effects are left out."""

INSTALL = "install it (Debian, Ubuntu: apt-get install espeak-ng) and try again"


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One word and its voice.

    Parameters
    ----------
    word
        The word.
    accent, variant
        The voice: members of :data:`ACCENTS` and :data:`VARIANTS`.
    speed
        Words per minute, 80 to 450.
    pitch
        0 to 99; 50 is the voice's default.
    """

    word: str
    accent: str
    variant: str
    speed: int
    pitch: int


Speak = Callable[[Utterance], np.ndarray]
"""``speak(utterance)``: float64 samples at 16 kHz, of shape (samples,)."""


class Espeak:
    """The synthesizer, which calls the command espeak-ng.

    Parameters
    ----------
    command
        Name or path of the program.

    Raises
    ------
    ValueError
        If it is not installed.
    """

    def __init__(self, command: str = "espeak-ng") -> None:
        path = shutil.which(command)
        if path is None:
            raise ValueError(f"the program {command}, which speaks, is missing; {INSTALL}")
        self._command = path

    def __call__(self, utterance: Utterance) -> np.ndarray:
        """Return the word without silence around it, at most 1 in size.

        Raises
        ------
        ValueError
            If espeak-ng fails or its output is silent.
        """
        sound = self._run(
            *("-v", f"{utterance.accent}+{utterance.variant}"),
            *("-s", str(utterance.speed), "-p", str(utterance.pitch)),
            *("-z", "--stdout", "--", utterance.word),
        )
        return trimmed(_resampled(*_pcm(sound)))

    def version(self) -> str:
        """Return the program's version, e.g. ``eSpeak NG text-to-speech: 1.51``."""
        output = self._run("--version").decode(errors="replace")
        return output.partition("Data at")[0].strip()

    def check(self, accents: Collection[str], variants: Collection[str]) -> None:
        """Raise ValueError if a voice is missing: espeak-ng would use another without an error."""
        files = self._run("--voices=variant").decode(errors="replace").split()
        for variant in variants:
            if f"!v/{variant}" not in files:
                raise ValueError(
                    f"{self._command} has no voice variant {variant!r}; {INSTALL} with the package "
                    "espeak-ng-data of version 1.51 or later"
                )
        for accent in accents:
            self._run("-v", accent, "-q", "--", "a")

    def _run(self, *args: str) -> bytes:
        try:
            done = subprocess.run(
                [self._command, *args], capture_output=True, check=False, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise ValueError(f"{self._command} cannot be run ({problem}); {INSTALL}") from None
        if done.returncode:
            why = " ".join(done.stderr.decode(errors="replace").split())
            raise ValueError(f"{self._command} {' '.join(args)} failed ({why}); {INSTALL}")
        return done.stdout


def trimmed(x: np.ndarray, *, floor: float = 0.02) -> np.ndarray:
    """Cut silence off both ends, below ``floor`` times the peak, and scale the peak to 1.

    Raises
    ------
    ValueError
        If the waveform is silent.
    """
    size = np.abs(x)
    peak = size.max(initial=0.0)
    if peak == 0:
        raise ValueError(f"the output of espeak-ng is silent; {INSTALL}")
    loud = np.flatnonzero(size > floor * peak)
    return np.asarray(x[loud[0] : loud[-1] + 1] / peak)


def _pcm(sound: bytes) -> tuple[np.ndarray, int]:
    """Return samples and rate of a WAV stream; its header does not have the length."""
    if len(sound) < 44 or sound[:4] != b"RIFF":
        raise ValueError(f"the output of espeak-ng is no WAV stream; {INSTALL}")
    rate = int.from_bytes(sound[24:28], "little")
    samples = np.frombuffer(sound[44 : 44 + (len(sound) - 44) // 2 * 2], dtype="<i2")
    return samples / 32768.0, rate


def _resampled(x: np.ndarray, rate: int) -> np.ndarray:
    from scipy import signal

    if rate == SAMPLE_RATE:
        return x
    common = int(np.gcd(rate, SAMPLE_RATE))
    resampled: np.ndarray = signal.resample_poly(x, SAMPLE_RATE // common, rate // common)
    return resampled
