"""Matplotlib figures as inline SVG: the colours of the page, the same bytes every time, no scripts.

Matplotlib is imported when a figure is made. Only :class:`matplotlib.figure.Figure` is used, never
pyplot, and :func:`house_style` puts back whatever settings the program had.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLOURS = {
    "ink": "#1d252c",
    "quiet": "#56626c",
    "rule": "#d9dee1",
    "page": "#fbfbf9",
    "seen": "#14646b",
    "unseen": "#b8560f",
    "gain": "#2f7f86",
    "loss": "#b3413b",
}
"""What figures are drawn in. In the page each becomes the variable of that name of report.css, so
that a figure follows light and dark mode."""

SMALL, NORMAL = 11.0, 12.0
"""Sizes of type in a figure, pixels where the figure has its natural width."""
LONGEST_NAME = 26
"""Letters of a name beside or above a figure; the middle of a longer one is left out."""

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedl2p",
    "text.parse_math": False,  # a client may be called $x$
    "font.size": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": NORMAL,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["quiet"],
    "ytick.labelcolor": COLOURS["ink"],
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.{size}.size": 0 for axis in "xy" for size in ("major", "minor")},
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Draw with our settings alone: neither matplotlibrc nor the program's settings count.

    Raises
    ------
    ModuleNotFoundError
        If Matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        # The reader's browser has more letters than the font that text is measured with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; its size is in pixels, as all lengths here."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return new axes at a place in pixels from the left and from the top of the figure."""
    whole_width, whole_height = 72 * figure.get_size_inches()
    return figure.add_axes(
        (
            left / whole_width,
            1 - (top + height) / whole_height,
            width / whole_width,
            height / whole_height,
        )
    )


def write(
    axes: Axes,
    x: float,
    y: float,
    words: str,
    *,
    size: float = NORMAL,
    colour: str = "ink",
    **more: Any,
) -> Text:
    """Write text at a place in pixels from the upper left corner of the axes, right of it."""
    return axes.annotate(
        words,
        (0, 1),
        (x, -y),
        xycoords="axes fraction",
        textcoords="offset pixels",
        fontsize=size,
        color=COLOURS[colour],
        annotation_clip=False,
        **more,
    )


def text_width(words: str, size: float = NORMAL) -> float:
    """Return the width of text in pixels, in a font that is wider than most."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(
        words, FontProperties(size=size), ismath=False
    )
    return width


def longest(names: Sequence[str], size: float = NORMAL) -> float:
    """Return the width of the widest of some names."""
    return max((text_width(name, size) for name in names), default=0.0)


def shorten(name: str, length: int = LONGEST_NAME) -> str:
    """Cut the middle out of a long name: layer names differ at both ends."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[-(length - 1 - head) :]}"


def inline_svg(figure: Figure, *, name: str, label: str, description: str) -> str:
    """Return a figure as one ``svg`` element for a page.

    Parameters
    ----------
    figure
        Made and saved under :func:`house_style`.
    name
        Starts every id, so that figures of one page do not share any.
    label, description
        What the figure shows, and what stands out in it, for readers who hear the page.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: v for key, v in element.attrib.items()}
        element.text, element.tail = (element.text or "").strip("\n "), None
        if "style" in element.attrib:
            element.attrib["style"] = _themed(element.attrib["style"])
        for child in list(element):
            # A style element of one figure would hold for the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
    _rename_ids(root, name)
    width, height = 72 * figure.get_size_inches()
    root.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": label,
        "style": f"--natural: {width:g}px",
    }
    desc = ElementTree.Element("desc")
    desc.text = description
    root.insert(0, desc)
    return ElementTree.tostring(root, encoding="unicode")


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Give ids that are referred to a new name, and drop the others."""
    used: dict[str, str] = {}
    for element in root.iter():
        for key, value in element.attrib.items():
            for found in re.findall(r"^#(.+)$" if key == "href" else r"url\(#([^)]+)\)", value):
                used.setdefault(found, f"{name}-{len(used)}")
    for element in root.iter():
        if (old := element.attrib.pop("id", None)) in used:
            element.attrib["id"] = used[old]
        for key, value in element.attrib.items():
            if key == "href" and value.startswith("#"):
                element.attrib[key] = f"#{used[value[1:]]}"
            elif "url(#" in value:
                element.attrib[key] = re.sub(
                    r"url\(#([^)]+)\)", lambda match: f"url(#{used[match[1]]})", value
                )


def _themed(style: str) -> str:
    style = re.sub(r"font-family: [^;]*(; |$)", "", style)  # that of the page
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    return style.rstrip("; ")
