"""Small pieces of inline SVG and PNG. Positions are percent across and pixels down.

A drawing so made fills the width it is given while text, dots and strokes keep their size, so one
figure serves a desktop and a phone.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.reporting.number_formats import short_number

Colour = tuple[int, int, int]
LONGEST_NAME = 26
"""Letters of a name beside or above a figure; the middle of a longer one is left out."""


def element(tag: str, content: str = "", /, **attributes: str | float | None) -> str:
    """Return one element; ``content`` is markup already, attribute values are escaped here.

    A trailing underscore is dropped from an attribute's name and other underscores become hyphens;
    None leaves the attribute out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{content}</{tag}>"


def text(words: str, **attributes: str | float | None) -> str:
    """Return a text element of plain words, which are escaped."""
    return element("text", html.escape(words), **attributes)


def title(words: str) -> str:
    """Return a tooltip of plain words, which are escaped."""
    return f"<title>{html.escape(words)}</title>"


def drawing(content: str, *, height: float, label: str, description: str = "") -> str:
    """Return a drawing as wide as its container. ``label`` says what it shows to those who hear.

    ``description`` says more: what stands out in it.
    """
    if description:
        content = title(label) + f"<desc>{html.escape(description)}</desc>" + content
    return element(
        "svg", content, width="100%", height=height, role="img", aria_label=label, class_="drawing"
    )


def shorten(words: str, length: int) -> str:
    """Cut the middle out of a long name: layer names differ at both ends."""
    if len(words) <= length:
        return words
    head = (length - 1) // 2
    return f"{words[:head]}…{words[-(length - 1 - head) :]}"


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers at equal steps; the first and the last enclose [low, high]."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def png(pixels: Sequence[Sequence[Colour]]) -> str:
    """Return an RGB image, rows from the top, as a data URI."""
    height, width = len(pixels), len(pixels[0])
    raw = b"".join(b"\0" + bytes(part for colour in row for part in colour) for row in pixels)

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Scale:
    """Numbers to colours.

    Parameters
    ----------
    stops
        Colours at equal distances from the lowest number to the highest.
    low, high
        The numbers at the ends; beyond them the end colours hold.
    log
        Whether equal ratios, not equal differences, are equal steps of colour.
    clipped
        Whether numbers beyond the ends exist; the legend then says so.
    """

    stops: tuple[Colour, ...]
    low: float
    high: float
    log: bool = False
    clipped: bool = False

    @classmethod
    def logarithmic(cls, stops: tuple[Colour, ...], values: Sequence[float]) -> Scale:
        """Span the positive finite values; of many, the outer 1 % at each end is cut off.

        One dead channel or one runaway rate would otherwise use up the whole range.
        """
        usable = sorted(v for v in values if 0 < v < math.inf)
        if not usable:
            return cls(stops, 0.1, 10.0, log=True)
        cut = len(usable) // 100
        low, high = usable[cut], usable[-1 - cut]
        if high < low * 1.05:
            low, high = low / 2, high * 2
        return cls(stops, low, high, log=True, clipped=low > usable[0] or high < usable[-1])

    def colour(self, value: float | None) -> Colour:
        """Return the colour of a number; grey for none, for NaN, and for zero on a log scale."""
        if value is None or math.isnan(value) or (self.log and value <= 0):
            return NO_VALUE
        place = self._place(value) * (len(self.stops) - 1)
        index = min(int(place), len(self.stops) - 2)
        part = place - index
        a, b = self.stops[index], self.stops[index + 1]
        return (_between(a[0], b[0], part), _between(a[1], b[1], part), _between(a[2], b[2], part))

    def legend(self, ends: tuple[str, str] | None = None) -> str:
        """Return a colour bar with its numbers, as HTML."""
        bar = ", ".join(f"rgb({r} {g} {b})" for r, g, b in self.stops)
        if ends is None:
            low, high = short_number(self.low), short_number(self.high)
            ends = (f"≤ {low}", f"≥ {high}") if self.clipped else (low, high)
        return (
            f'<div class="bar" style="background:linear-gradient(to right, {bar})"></div>'
            f'<div class="ends"><span>{html.escape(ends[0])}</span>'
            f"<span>{html.escape(ends[1])}</span></div>"
        )

    def _place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high = math.log(low), math.log(high)
            value = math.log(value) if value < math.inf else high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def _palette(colours: str) -> tuple[Colour, ...]:
    return tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in colours.split())


NO_VALUE: Colour = (150, 150, 150)
# From pale to dark, or over a pale middle, in hues that colour-blind people tell apart.
BLUE_TO_ORANGE = _palette("2c5f8a 5d92bd a3c5de e8e6e1 f3c088 dd8a3d a3520c")
TEALS = _palette("edf5f3 bfe0dc 86c3bf 4a9fa0 23777e 0e4f5a 07303a")
PURPLES = _palette("f3eff7 d9cfe8 b9a8d6 967fc0 7357a6 523585 341a5c")


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return html.escape(value, quote=True)
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _between(a: int, b: int, part: float) -> int:
    return round(a + (b - a) * part)
