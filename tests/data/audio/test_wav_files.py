"""Reading WAV files, and distorting clips at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p.data.audio.distortion import Distort
from fedl2p.data.audio.filter_banks import SAMPLE_RATE, FilterBank
from fedl2p.data.audio.wav_files import CLIP, one_second, read_wav, to_float, write_wav
from support.speech_tree import tone, write

soundfile = pytest.importorskip("soundfile")

BANK = FilterBank(bins=40, shift_ms=20.0, frames=50)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    samples = np.arange(-500, 500, dtype=np.int16) * 60
    write_wav(tmp_path / "a.wav", samples)
    assert read_wav(tmp_path / "a.wav").dtype == np.int16
    assert np.array_equal(read_wav(tmp_path / "a.wav"), samples)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")


def test_a_clip_is_padded_or_cut_to_a_second() -> None:
    samples = np.arange(1, 20_001, dtype=np.int16)
    assert np.array_equal(one_second(samples), samples[:CLIP])
    short = one_second(samples[:100])
    assert len(short) == CLIP
    assert np.array_equal(short[:100], samples[:100])
    assert not short[100:].any()


def damaged(kind: str, path: Path) -> None:
    if kind == "another rate":
        write(path, tone(440), rate=8000)
    elif kind == "stereo":
        write(path, np.stack([tone(440)] * 2, 1))
    elif kind == "no samples":
        write(path, np.zeros(0))
    elif kind == "cut off":
        write(path, tone(440))
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "cut off in its head":
        write(path, tone(440))
        path.write_bytes(path.read_bytes()[:30])
    elif kind == "no bytes":
        path.write_bytes(b"")
    elif kind == "no WAV":
        path.write_bytes(b"this is text, not sound" * 10)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another rate", "has 8000 samples per second, but must have 16000; convert it"),
        ("stereo", "has 2 channels, but must have 1; mix it down"),
        ("no samples", "has no samples; remove it"),
        ("cut off", "is cut off: it should have 32044 bytes and has 20000; fetch it again"),
        ("cut off in its head", "is cut off: it should have 32044 bytes and has 30"),
        ("no bytes", "is not a readable WAV file .*; fetch it again"),
        ("no WAV", "is not a readable WAV file .*; fetch it again"),
        ("missing", "is missing; put it back"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "yes.wav"
    damaged(kind, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_wav(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def clips(count: int = 64) -> torch.Tensor:
    x = 0.3 * torch.randn(count, CLIP, generator=rng(5))
    return (x.clamp(-1, 1) * 32767).to(torch.int16)


def distort(**fields: float) -> Distort:
    noises = torch.cat([torch.full((20_000,), 8192), torch.full((16_000,), 16384)]).to(torch.int16)
    return Distort(BANK, noises, (20_000, 16_000), **fields)


def test_every_clip_is_shifted_by_itself_within_100_ms() -> None:
    x = torch.zeros(200, CLIP, dtype=torch.int16)
    x[:, 8000] = 16384
    moved = distort(noise_probability=0.0).waveforms(x, rng())
    at = moved.argmax(1) - 8000
    assert torch.equal(moved.sum(1), torch.full((200,), 0.5))
    assert int(at.min()) >= -1600
    assert int(at.max()) <= 1600
    assert at.float().std().item() == pytest.approx(3200 / 12**0.5, rel=0.15)
    assert len(at.unique()) > 150


def test_silence_moves_in_at_the_ends() -> None:
    x = clips(40)
    moved = distort(noise_probability=0.0, shift_ms=50.0).waveforms(x, rng(1))
    plain = to_float(x)
    for before, after in zip(plain, moved, strict=True):
        shift = next(s for s in range(-800, 801) if torch.equal(_moved(before, s), after))
        assert abs(shift) <= 800


def _moved(x: torch.Tensor, shift: int) -> torch.Tensor:
    moved = torch.zeros_like(x)
    if shift >= 0:
        moved[shift:] = x[: len(x) - shift]
    else:
        moved[:shift] = x[-shift:]
    return moved


def test_noise_comes_with_its_probability_at_a_uniform_volume_from_either_file() -> None:
    silence = torch.zeros(2000, CLIP, dtype=torch.int16)
    mixed = distort(shift_ms=0.0).waveforms(silence[:, :CLIP], rng(2))
    # Both noises are constant: 0.25 in the first file, 0.5 in the second, never both in one clip.
    assert torch.equal(mixed.amin(1), mixed.amax(1))
    levels = mixed[:, 0]
    assert (levels > 0).float().mean().item() == pytest.approx(0.8, abs=0.04)
    assert float(levels.max()) <= 0.1 * 0.5
    # volume x level: uniform(0, 0.1) x 0.25 or 0.5 with probability 1/2 each
    heard = levels[levels > 0]
    assert heard.mean().item() == pytest.approx(0.05 * 0.375, rel=0.06)
    assert (heard > 0.025).float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_cuts_of_the_noise_start_anywhere_in_it() -> None:
    ramp = torch.arange(20_000, dtype=torch.int16)
    augment = Distort(BANK, ramp, (20_000,), shift_ms=0.0, noise_probability=1.0, noise_volume=1.0)
    first = torch.zeros(500, CLIP, dtype=torch.int16)
    x = augment.waveforms(first, rng(3))
    # slope = volume, start = level / volume
    volume = (x[:, -1] - x[:, 0]) / (CLIP - 1) * 32768
    begin = x[:, 0] / volume * 32768
    assert float(begin.min()) >= -1
    assert float(begin.max()) <= 4001
    assert float(begin.mean()) == pytest.approx(2000, rel=0.1)


def test_the_same_generator_gives_the_same_clips_and_another_does_not() -> None:
    augment, x = distort(), clips(8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(augment(x, rng(7)), augment(x, rng(7)))
    assert not torch.equal(augment(x, rng(7)), augment(x, rng(8)))
    assert torch.equal(before, torch.get_rng_state())


def test_features_are_those_of_the_distorted_waveforms() -> None:
    augment, x = distort(), clips(4)
    features = augment(x, rng(4))
    assert features.shape == (4, 1, 50, 40)
    torch.testing.assert_close(features, BANK(augment.waveforms(x, rng(4))))
    still = distort(shift_ms=0.0, noise_probability=0.0)
    torch.testing.assert_close(still(x, rng(4)), BANK(to_float(x)))


def test_loud_clips_stay_within_full_scale() -> None:
    loud = torch.full((50, CLIP), 32767, dtype=torch.int16)
    x = distort(noise_probability=1.0, noise_volume=1.0).waveforms(loud, rng())
    assert float(x.max()) <= 1.0


def test_no_noise_at_all() -> None:
    augment = Distort(BANK, torch.zeros(0, dtype=torch.int16), (), shift_ms=0.0)
    assert torch.equal(augment.waveforms(clips(3), rng()), to_float(clips(3)))
    assert SAMPLE_RATE == CLIP
