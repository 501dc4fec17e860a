"""Spoken commands without a download: synthesized speakers in the layout of Speech Commands.

``fedl2p data make spoken`` synthesizes the words of Speech Commands with espeak-ng in 60 voices and
writes ``clips/`` in the archive's layout (:mod:`fedl2p.data.audio.speech_commands`), which
:mod:`fedl2p.data.speech` reads. Speakers differ in properties that are drawn once per speaker:

- the voice: accent (8) and variant (75, each used once before any comes twice), pitch and speed;
- the recording device: one of 8 kinds, with a severity (narrow or muffled bands, a bare room, an
  echo, overdriven, coarse, ...; :data:`fedl2p.data.audio.recording_conditions.DEVICES`);
- the background noise, one of 7 kinds, 5 to 30 dB below the speech, and the loudness, 26 dB from
  the loudest to the quietest.

Each clip varies the speaker's pitch and speed, its position in the second and its loudness. Unseen
speakers are drawn at random; half of them are in the validation list, half in the testing list. So
``silence``, cut from the clean background noises, is easy, and everything else is not.

The same settings give the same files under the same version of espeak-ng.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedl2p.data.audio.espeak import ACCENTS, VARIANTS, Espeak, Speak, Utterance
from fedl2p.data.audio.filter_banks import SAMPLE_RATE
from fedl2p.data.audio.recording_conditions import DEVICES, NOISES, apply_device, make_noise
from fedl2p.data.audio.speech_commands import COMMANDS, LISTS, NOISE, problems
from fedl2p.data.audio.wav_files import CLIP, write_wav
from fedl2p.data.files.folders import ProgressCallback
from fedl2p.data.speech import ABOUT, CLIPS, clips_remedy
from fedl2p.seeds import derive_seed

OTHERS = (
    *("backward", "bed", "bird", "cat", "dog", "eight", "five", "follow", "forward", "four"),
    *("happy", "house", "learn", "marvin", "nine", "one", "seven", "sheila", "six", "three"),
    *("tree", "two", "visual", "wow", "zero"),
)
"""The words of Speech Commands that are no commands."""

NOISE_SECONDS = 20
LONGEST = 0.95
"""Most seconds of a word in a clip; a longer one is cut."""


@dataclass(frozen=True, kw_only=True)
class Make:
    """Synthesize the commands with espeak-ng.

    Parameters
    ----------
    speakers
        Number of speakers, each with a different voice.
    unseen
        Number of speakers in the validation and testing lists.
    repeats
        Clips of each command per speaker.
    others
        Words that are no commands, one clip each, per speaker.
    seed
        Determines the speakers and every clip.
    workers
        Threads; 0 for one per processor.
    """

    speakers: int = 60
    unseen: int = 15
    repeats: int = 10
    others: int = 20
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.unseen < self.speakers:
            raise ValueError(
                f"unseen must be 0 or more and below speakers, got {self.unseen} of {self.speakers}"
            )
        if self.repeats < 1 or not 1 <= self.others <= len(OTHERS):
            raise ValueError(
                f"repeats must be 1 or more and others 1 to {len(OTHERS)}, got {self.repeats} and "
                f"{self.others}"
            )
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (one per processor) or more, got {self.workers}")

    def run(self, root: Path, progress: ProgressCallback) -> None:
        """Write ``clips/`` into ``root``, completely or not at all.

        Raises
        ------
        ValueError
            If espeak-ng is missing, or the folder holds clips of other settings.
        """
        if not self._exists(root):
            espeak = Espeak()
            speakers = draw_speakers(self)
            espeak.check({s.accent for s in speakers}, {s.variant for s in speakers})
            write_archive(self, root, espeak, progress, made_by=espeak.version())

    def _exists(self, root: Path) -> bool:
        if not (root / CLIPS).exists():
            return False
        try:
            settings = json.loads((root / CLIPS / ABOUT).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            settings = "unknown"
        if settings != _settings(self):
            raise ValueError(
                f"{root / CLIPS} is there already, made with other settings ({settings}); move it "
                "away or name another folder by --root"
            )
        return True


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A speaker's voice and recording conditions.

    Parameters
    ----------
    name
        As in the files' names.
    accent, variant
        The voice, see :mod:`fedl2p.data.audio.espeak`.
    pitch, speed
        Centres of the range of the clips' pitch and speed.
    device, severity
        Kind of recording device, and its severity.
    noise, snr
        Kind of background noise, and the signal-to-noise ratio, dB.
    loudness
        Peak of the clips, dB below full scale (negative).
    held_out
        Whether the speaker is unseen.
    """

    name: str
    accent: str
    variant: str
    pitch: int
    speed: int
    device: str
    severity: float
    noise: str
    snr: float
    loudness: float
    held_out: bool


def draw_speakers(make: Make) -> list[Speaker]:
    """Draw the speakers: every voice, device and noise equally often."""
    rng = np.random.default_rng(derive_seed(make.seed, "spoken", "speakers"))
    count = make.speakers
    accents, variants = _balanced(ACCENTS, count, rng), _balanced(VARIANTS, count, rng)
    devices, noises = _balanced(tuple(DEVICES), count, rng), _balanced(tuple(NOISES), count, rng)
    held_out = set(rng.permutation(count)[: make.unseen].tolist())
    width = max(2, len(str(count - 1)))
    return [
        Speaker(
            name=f"voice{i:0{width}d}",
            accent=accents[i],
            variant=variants[i],
            pitch=int(rng.integers(25, 76)),
            speed=int(rng.integers(120, 200)),
            device=devices[i],
            severity=round(float(rng.uniform(0.2, 1)), 3),
            noise=noises[i],
            snr=round(float(rng.uniform(5, 30)), 1),
            loudness=round(float(rng.uniform(-30, -4)), 1),
            held_out=i in held_out,
        )
        for i in range(count)
    ]


def write_archive(
    make: Make, root: Path, speak: Speak, progress: ProgressCallback, *, made_by: str = "unknown"
) -> None:
    """Write the folder ``clips/`` with words from the synthesizer ``speak``, completely or not.

    Raises
    ------
    ValueError
        If the folder cannot be written. Errors of ``speak`` are passed on. Nothing is left then.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{CLIPS}.", suffix=".tmp"))
    except OSError as problem:
        raise ValueError(
            f"cannot write into {root} ({problem.strerror}); name another folder by --root"
        ) from None
    try:
        speakers = draw_speakers(make)
        _write_clips(make, temporary, speakers, speak, progress)
        _write_noises(make, temporary)
        _write_lists(make, temporary, speakers)
        _write_about(make, temporary, speakers, made_by)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.rename(temporary, root / CLIPS)
    except OSError as problem:
        raise ValueError(
            f"cannot write {root / CLIPS} ({problem.strerror or problem}); free some space, move "
            "away what is there, or name another folder by --root"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check(root: Path) -> list[str]:
    """Return what is missing or damaged among the clips; every file is read."""
    return problems(root / CLIPS, remedy=clips_remedy("spoken", root))


def words_of(make: Make, speaker: Speaker) -> list[tuple[str, int]]:
    """Return a speaker's words and the number of clips of each."""
    rng = np.random.default_rng(derive_seed(make.seed, "spoken", speaker.name, "words"))
    others = sorted(rng.permutation(len(OTHERS))[: make.others].tolist())
    return [(word, make.repeats) for word in COMMANDS] + [(OTHERS[i], 1) for i in others]


def _write_clips(
    make: Make, folder: Path, speakers: Sequence[Speaker], speak: Speak, progress: ProgressCallback
) -> None:
    for word in (*COMMANDS, *OTHERS):
        (folder / word).mkdir()
    pool = ThreadPoolExecutor(make.workers or os.cpu_count() or 1)
    try:
        jobs: list[Future[None]] = [
            pool.submit(_write_word, make, folder, speaker, word, times, speak)
            for speaker in speakers
            for word, times in words_of(make, speaker)
        ]
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            progress("speaking", done, len(jobs))
    finally:
        # After an error or an interrupt no further word is begun.
        pool.shutdown(cancel_futures=True)
    for word in OTHERS:
        if not any((folder / word).iterdir()):
            (folder / word).rmdir()


def _write_word(
    make: Make, folder: Path, speaker: Speaker, word: str, times: int, speak: Speak
) -> None:
    """Write all clips of one word by one speaker."""
    clips = []
    for i in range(times):
        rng = np.random.default_rng(derive_seed(make.seed, "spoken", speaker.name, word, i))
        sound = speak(
            Utterance(
                word=word,
                accent=speaker.accent,
                variant=speaker.variant,
                speed=int(np.clip(speaker.speed * rng.uniform(0.8, 1.25), 80, 450)),
                pitch=int(np.clip(speaker.pitch + rng.integers(-12, 13), 0, 99)),
            )
        )
        clips.append(_place(sound, speaker, rng))
    # The same draws for all words: a speaker has one device.
    rng = np.random.default_rng(derive_seed(make.seed, "spoken", speaker.name, "device"))
    recorded = apply_device(speaker.device, np.stack(clips), severity=speaker.severity, rng=rng)
    for i, clip in enumerate(recorded):
        rng = np.random.default_rng(derive_seed(make.seed, "spoken", speaker.name, word, i, "gain"))
        peak = 10 ** ((speaker.loudness + rng.uniform(-3, 3)) / 20)
        write_wav(folder / word / f"{speaker.name}_nohash_{i}.wav", _int16(clip, peak))


def _place(word: np.ndarray, speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """Return a second of the speaker's noise with the word at a random position."""
    word = word[: int(LONGEST * SAMPLE_RATE)]
    begin = int(rng.integers(0, CLIP - len(word) + 1))
    level = np.sqrt(np.mean(word**2)) * 10 ** (-speaker.snr / 20)
    clip = level * make_noise(speaker.noise, CLIP, rng)
    clip[begin : begin + len(word)] += word
    return np.asarray(clip)


def _int16(x: np.ndarray, peak: float) -> np.ndarray:
    """Return samples scaled so that the largest is ``peak`` (full scale = 1), at most 1."""
    scaled = x * (min(peak, 1.0) / (np.abs(x).max() + 1e-12))
    return np.asarray(np.round(scaled * 32767), dtype=np.int16)


def _write_noises(make: Make, folder: Path) -> None:
    (folder / NOISE).mkdir()
    for kind in NOISES:
        rng = np.random.default_rng(derive_seed(make.seed, "spoken", "noise", kind))
        noise = make_noise(kind, NOISE_SECONDS * SAMPLE_RATE, rng)
        write_wav(folder / NOISE / f"{kind}.wav", _int16(noise, 0.5))


def _write_lists(make: Make, folder: Path, speakers: Sequence[Speaker]) -> None:
    """List the clips of the held-out speakers, one half of these in either list."""
    held_out = [speaker for speaker in speakers if speaker.held_out]
    for i, name in enumerate(LISTS):
        lines = [line for s in held_out[i::2] for line in _clip_names(make, s)]
        (folder / name).write_text("".join(f"{line}\n" for line in sorted(lines)), "utf-8")


def _clip_names(make: Make, speaker: Speaker) -> Iterator[str]:
    for word, times in words_of(make, speaker):
        yield from (f"{word}/{speaker.name}_nohash_{i}.wav" for i in range(times))


def _write_about(make: Make, folder: Path, speakers: Sequence[Speaker], made_by: str) -> None:
    """Write the settings and the description of every speaker, beside the archive's layout."""
    hidden = ("name", "held_out")
    described = {
        s.name: {k: v for k, v in dataclasses.asdict(s).items() if k not in hidden}
        for s in speakers
    }
    content = {"settings": _settings(make), "made_by": made_by, "speakers": described}
    (folder / ABOUT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _settings(make: Make) -> dict[str, int]:
    return {k: v for k, v in dataclasses.asdict(make).items() if k not in ("workers", "root")}


def _balanced(kinds: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Return ``count`` kinds in random order, each as often as any other to within one."""
    order = [kinds[i] for i in rng.permutation(len(kinds))]
    repeated = [order[i % len(order)] for i in range(count)]
    return [repeated[i] for i in rng.permutation(count)]
