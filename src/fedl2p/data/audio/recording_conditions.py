"""Simulated recording conditions of a speaker: background noise and the recording device.

All waveforms are float64, 16,000 samples per second. A noise has a root mean square of 1 (clicks:
about). A device takes clips of one speaker, of shape (n, samples), and a severity in [0, 1], from
its mildest to its strongest form, and changes each clip separately; a property of the device (a
corner frequency, the room's reflections) is drawn once per call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedl2p.data.audio.filter_banks import SAMPLE_RATE

Noise = Callable[[int, np.random.Generator], np.ndarray]
Device = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def make_noise(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise of a kind in :data:`NOISES`, of shape (samples,)."""
    return NOISES[kind](samples, rng)


def apply_device(
    kind: str, clips: np.ndarray, *, severity: float, rng: np.random.Generator
) -> np.ndarray:
    """Return clips as a device of a kind in :data:`DEVICES` records them.

    Parameters
    ----------
    kind
        A name in :data:`DEVICES`.
    clips
        Shape (n, samples).
    severity
        In [0, 1].
    rng
        Source of the device's random properties.

    Returns
    -------
    numpy.ndarray
        Shape (n, samples).

    Raises
    ------
    ValueError
        If there is no such kind or the severity is out of range.
    """
    if kind not in DEVICES:
        raise ValueError(f"there is no device {kind!r}; the kinds are {', '.join(DEVICES)}")
    if not 0 <= severity <= 1:
        raise ValueError(f"a severity lies between 0 and 1, got {severity}")
    return DEVICES[kind](clips, severity, rng)


def _coloured(slope: float) -> Noise:
    """Return noise whose power falls with frequency to the power of ``slope``."""

    def make(samples: int, rng: np.random.Generator) -> np.ndarray:
        spectrum = np.fft.rfft(rng.standard_normal(samples))
        hertz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
        # Flat below 20 Hz: inaudible, and most of the power would be there.
        return _unit(np.fft.irfft(spectrum * np.maximum(hertz, 20.0) ** (-slope / 2), samples))

    return make


def _hum(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Mains hum: 50 Hz and its harmonics, over a little white noise."""
    t = np.arange(samples) / SAMPLE_RATE
    tones = [
        np.sin(2 * np.pi * (50 * k * t + rng.random())) * rng.uniform(0.2, 1) / k**0.5
        for k in range(1, 25)
    ]
    return _unit(_unit(np.sum(tones, 0)) + 0.1 * rng.standard_normal(samples))


def _fan(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the noise of a fan: pink noise, modulated by its blades."""
    t = np.arange(samples) / SAMPLE_RATE
    beat = 1 + 0.6 * np.sin(2 * np.pi * (rng.uniform(8, 25) * t + rng.random()))
    return _unit(_coloured(1.0)(samples, rng) * beat)


def _clicks(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Short knocks, about ten a second, over a little white noise."""
    hits = (rng.random(samples) < 10 / SAMPLE_RATE) * rng.uniform(5, 30, samples)
    ring = np.exp(-np.arange(400) / 60) * rng.standard_normal(400)
    return np.convolve(hits, ring)[:samples] / 3 + 0.2 * rng.standard_normal(samples)


def _babble(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Many voices: noise in the frequency bands of vowels, modulated at the rate of syllables."""
    t = np.arange(samples) / SAMPLE_RATE
    total = np.zeros(samples)
    for low, high in ((120, 400), (400, 900), (900, 1800), (1800, 3400)):
        for _ in range(3):
            band = _band(rng.standard_normal(samples), low, high)
            rate = 1 + np.sin(2 * np.pi * (rng.uniform(2, 6) * t + rng.random()))
            total += _unit(band) * rate / np.sqrt(low)
    return _unit(total)


def _none(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    return x


def _telephone(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Pass a narrow band, 300 to 3400 Hz or narrower."""
    return _band(x, 300 + 250 * severity, 3400 - 1400 * severity)


def _muffled(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Muffle as a pocket does: nothing above 1.8 to 0.8 kHz."""
    return _band(x, None, 1800 - 1000 * severity)


def _thin(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Sound like a tiny microphone: nothing below 0.7 to 1.7 kHz."""
    return _band(x, 700 + 1000 * severity, None)


def _room(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Add a bare room: noise that fades by 60 dB in 0.4 to 1.2 s."""
    seconds = 0.4 + 0.8 * severity
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / seconds)
    tail *= (0.7 + 0.8 * severity) / np.linalg.norm(tail)
    tail[0] += 1
    return _convolved(x, tail)


def _echo(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Repeat twice, as a wall does, 80 to 160 ms apart."""
    gap = int(rng.uniform(0.08, 0.16) * SAMPLE_RATE)
    response = np.zeros(2 * gap + 1)
    response[[0, gap, 2 * gap]] = 1, 0.4 + 0.4 * severity, 0.2 + 0.3 * severity
    return _convolved(x, response)


def _overdriven(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Far too loud: the waveform is cut at a fraction of its peak."""
    peak = np.abs(x).max(-1, keepdims=True) + 1e-9
    limit = (0.25 - 0.22 * severity) * peak
    return np.asarray(np.clip(x, -limit, limit) / limit * peak)


def _coarse(x: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Quantize coarsely: every second to fourth sample, repeated, at 5 to 3 bits."""
    step = 2 + round(2 * severity)
    repeated = np.repeat(x[..., ::step], step, -1)[..., : x.shape[-1]]
    levels = 2 ** (5 - round(2 * severity)) / 2
    peak = np.abs(x).max(-1, keepdims=True) + 1e-9
    return np.asarray(np.round(repeated / peak * levels) / levels * peak)


def _band(x: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Filter to the band between two frequencies, in Hz; None for no bound on that side."""
    from scipy import signal

    kind = "lowpass" if low is None else "highpass" if high is None else "bandpass"
    edges = [edge for edge in (low, high) if edge is not None]
    sos = signal.butter(
        4, edges if len(edges) > 1 else edges[0], kind, fs=SAMPLE_RATE, output="sos"
    )
    filtered: np.ndarray = signal.sosfilt(sos, x)
    return filtered


def _convolved(x: np.ndarray, response: np.ndarray) -> np.ndarray:
    from scipy import signal

    shaped = response.reshape(*(1,) * (x.ndim - 1), -1)
    convolved: np.ndarray = signal.fftconvolve(x, shaped, axes=-1)
    return convolved[..., : x.shape[-1]]


def _unit(x: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = x / np.sqrt(np.mean(x**2))
    return scaled


NOISES: dict[str, Noise] = {
    "white": _coloured(0.0),
    "pink": _coloured(1.0),
    "brown": _coloured(2.0),
    "hum": _hum,
    "fan": _fan,
    "clicks": _clicks,
    "babble": _babble,
}
"""Every kind of noise by name."""

DEVICES: dict[str, Device] = {
    "none": _none,
    "telephone": _telephone,
    "muffled": _muffled,
    "thin": _thin,
    "room": _room,
    "echo": _echo,
    "overdriven": _overdriven,
    "coarse": _coarse,
}
"""Every kind of device by name."""
