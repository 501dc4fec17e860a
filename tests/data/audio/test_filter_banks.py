"""Log-mel filter banks against kaldi-native-fbank and against what the formulas say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedl2p.data.audio import filter_banks
from fedl2p.data.audio.filter_banks import MEAN, SAMPLE_RATE, SD, FilterBank, mel_filters, mel_of

FLOOR = math.log(2.0**-23)


def kaldi(waveform: Tensor, *, bins: int, shift_ms: float, window_ms: float = 25.0) -> Tensor:
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.frame_opts.frame_shift_ms = shift_ms
    options.frame_opts.frame_length_ms = window_ms
    options.mel_opts.num_bins = bins
    options.htk_compat = True
    options.use_energy = False
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(SAMPLE_RATE, waveform.tolist())
    fbank.input_finished()
    frames = [fbank.get_frame(i) for i in range(fbank.num_frames_ready)]
    return torch.from_numpy(np.stack(frames))


def waveforms() -> Tensor:
    """Noise, a chirp, a quiet tone on an offset, a click in silence."""
    t = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    click = torch.zeros(SAMPLE_RATE)
    click[7000] = 0.9
    return torch.stack(
        [
            0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0)),
            0.5 * torch.sin(2 * math.pi * (50 + 3000 * t) * t),
            0.2 + 1e-3 * torch.sin(2 * math.pi * 440 * t),
            click,
        ]
    )


@pytest.mark.parametrize("bins", [23, 40, 80, 120])
@pytest.mark.parametrize("shift_ms", [10.0, 20.0])
def test_the_same_as_kaldi_native_fbank(bins: int, shift_ms: float) -> None:
    ours = FilterBank(bins=bins, shift_ms=shift_ms, frames=0).log_mel(waveforms())
    for waveform, own in zip(waveforms(), ours, strict=True):
        theirs = kaldi(waveform, bins=bins, shift_ms=shift_ms)
        # The quietest of a pure tone's bins are rounding errors of a float32 transform.
        loud = theirs > theirs.max() - 12
        torch.testing.assert_close(own[loud], theirs[loud], rtol=0, atol=1e-3)
        torch.testing.assert_close(own, theirs, rtol=0, atol=0.2)


def test_noise_is_the_same_as_kaldis_to_the_last_bin() -> None:
    noise = waveforms()[0]
    ours = FilterBank(bins=40, shift_ms=20.0, frames=0).log_mel(noise)
    torch.testing.assert_close(ours, kaldi(noise, bins=40, shift_ms=20.0), rtol=0, atol=1e-4)


def test_the_published_128_filters_are_those_of_kaldi(monkeypatch: pytest.MonkeyPatch) -> None:
    # kaldi-native-fbank refuses 128 filters on a window of 25 ms, of which some are empty; of a
    # window of 50 ms none is, and the filters, as functions of the frequency, are the same.
    monkeypatch.setattr(filter_banks, "WINDOW_MS", 50.0)
    filter_banks._tables.cache_clear()
    noise = waveforms()[0]
    try:
        ours = FilterBank(bins=128, frames=0).log_mel(noise)
    finally:
        filter_banks._tables.cache_clear()
    theirs = kaldi(noise, bins=128, shift_ms=10.0, window_ms=50.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_a_filter_between_two_frequencies_gives_the_floor() -> None:
    filters = mel_filters(128, transform=512)
    empty = (filters.sum(0) == 0).nonzero().flatten().tolist()
    assert empty
    assert max(empty) < 10
    features = FilterBank(frames=0).log_mel(waveforms()[0])
    assert features[:, empty].unique().tolist() == pytest.approx([FLOOR])
    assert float(features[:, 20:].min()) > FLOOR


def test_mel_is_htks() -> None:
    hertz = torch.tensor([0.0, 700.0, 1000.0, 8000.0], dtype=torch.float64)
    # 2595 log10(1 + f / 700), as the HTK Book writes it, with its rounded factor
    htk = 2595 * torch.log10(1 + hertz / 700)
    torch.testing.assert_close(mel_of(hertz), htk, rtol=1e-4, atol=1e-9)
    assert float(mel_of(hertz[2])) == pytest.approx(1000, abs=0.1)


def test_filters_are_triangles_that_sum_to_one_between_the_outer_centres() -> None:
    bins = 20
    filters = mel_filters(bins, transform=512)
    assert filters.shape == (257, bins)
    hertz = torch.arange(257, dtype=torch.float64) * SAMPLE_RATE / 512
    low, high = mel_of(torch.tensor([20.0, 8000.0], dtype=torch.float64))
    step = (high - low) / (bins + 1)
    position = (mel_of(hertz) - low) / step
    inner = (position >= 1) & (position <= bins)
    torch.testing.assert_close(
        filters.sum(1)[inner], torch.ones(int(inner.sum()), dtype=torch.float64)
    )
    assert bool((filters[position <= 0] == 0).all())
    assert bool((filters[-1] == 0).all())
    assert bool(((filters > 0).sum(1) <= 2).all())


@pytest.mark.parametrize("hertz", [250.0, 1000.0, 3500.0])
def test_a_tone_is_loudest_in_the_filter_that_holds_it(hertz: float) -> None:
    t = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    features = FilterBank(bins=40, frames=0).log_mel(0.5 * torch.sin(2 * math.pi * hertz * t))
    low, high = mel_of(torch.tensor([20.0, 8000.0]))
    position = (mel_of(torch.tensor(hertz)) - low) / ((high - low) / 41) - 1
    assert abs(float(features[50].argmax()) - float(position)) <= 0.75


def test_a_factor_on_the_waveform_adds_twice_its_logarithm() -> None:
    noise = waveforms()[0].double()
    bank = FilterBank(bins=40, frames=0)
    louder = bank.log_mel(3 * noise) - bank.log_mel(noise)
    torch.testing.assert_close(louder, torch.full_like(louder, 2 * math.log(3)))


def test_an_offset_changes_nothing_and_silence_is_the_floor() -> None:
    noise = waveforms()[0].double()
    bank = FilterBank(bins=40, frames=0)
    torch.testing.assert_close(bank.log_mel(noise + 0.3), bank.log_mel(noise))
    silent = bank.log_mel(torch.zeros(SAMPLE_RATE))
    torch.testing.assert_close(silent, torch.full_like(silent, FLOOR))


def test_frames_are_counted_padded_and_cut_as_published() -> None:
    noise = waveforms()[0]
    plain = FilterBank(frames=0).log_mel(noise)
    assert plain.shape == (98, 128)  # 1 + (16000 - 400) // 160: only whole frames
    x = FilterBank()(noise)
    assert x.shape == (1, 128, 128)
    torch.testing.assert_close(x[0, :98], (plain + 4.2677393) / (2 * 4.5689974))
    assert x[0, 98:].unique().tolist() == pytest.approx([-MEAN / (2 * SD)])
    torch.testing.assert_close(FilterBank(frames=30)(noise), x[:, :30])


def test_a_batch_is_its_clips_one_by_one() -> None:
    bank = FilterBank(bins=40)
    batch = waveforms().view(2, 2, -1)
    features = bank(batch)
    assert features.shape == (2, 2, 1, 128, 40)
    torch.testing.assert_close(features[1, 0], bank(batch[1, 0]), rtol=0, atol=1e-4)


def test_bad_settings_and_clips_are_refused() -> None:
    for fields in ({"bins": 0}, {"shift_ms": 0.5}, {"shift_ms": math.nan}, {"frames": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(fields))} must be"):
            FilterBank(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a clip has 399 samples, but a frame needs 400"):
        FilterBank()(torch.zeros(399))
