"""Matplotlib figures as inline SVG that takes its colours and font from the page around it.

A figure is drawn with placeholder colours that become CSS variables, so one drawing serves the light and the dark
theme; text stays text. The same input gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agentark_jax.report.words import clean

INK, MUTED, GRID = "#000101", "#000102", "#000103"
SERIES = tuple(f"#0002{index:02x}" for index in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "agentark",
    "text.parse_math": False,
    "font.size": 12,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "xtick.minor.visible": False,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
_XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Canvas:
    """What a drawing function gets: axes of `width` × `height` pixels of page; `narrow` on a phone."""

    axes: Axes
    figure: Figure
    width: float
    height: float
    narrow: bool


@dataclass(frozen=True)
class Plot:
    """A plot for the page: two drawings (laptop and phone), its words, and its numbers as a table."""

    name: str
    title: str
    alt: str
    caption: str
    wide: str
    narrow: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]


def draw(name: str, paint: Callable[[Canvas], None], width: int, height: int) -> tuple[str, str]:
    """(wide, narrow): `paint` called on a canvas of `width` and on one of 340 pixels, as SVG with unique ids."""
    return _drawing(f"{name}-wide", paint, width, height, False), _drawing(f"{name}-narrow", paint, 340, height, True)


def _drawing(name: str, paint: Callable[[Canvas], None], width: int, height: int, narrow: bool) -> str:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser's fonts draw the text; what the measuring font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        left, right, bottom, top = 58, 12, 48, 14
        axes = figure.add_axes(
            (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
        )
        paint(Canvas(axes, figure, width, height, narrow))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _themed(text.getvalue(), name)


def _themed(svg: str, name: str) -> str:
    """The bare <svg> element: no metadata, no styles, ids prefixed with `name`, CSS variables for colours."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    referenced: set[str] = set()
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if _XLINK in element.attrib:
            target = element.attrib.pop(_XLINK).removeprefix("#")
            referenced.add(target)
            element.set("href", f"#{name}-{target}")
        clip = re.fullmatch(r"url\(#(.+)\)", element.get("clip-path", ""))
        if clip:
            referenced.add(clip[1])
            element.set("clip-path", f"url(#{name}-{clip[1]})")
        if "style" in element.attrib:
            element.set("style", _style(element.attrib["style"]))
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in referenced:
            element.set("id", f"{name}-{identity}")
        if element.tag not in ("text", "title"):
            element.text = element.text and (element.text.strip() or None)
        element.tail = None
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("class", "plot")
    root.set("aria-hidden", "true")
    return ElementTree.tostring(root, encoding="unicode", method="xml")


def _style(style: str) -> str:
    style = re.sub(r"font-family: [^;]+(; )?", "", style)
    return re.sub(r"#000[12][0-9a-f]{2}", lambda match: f"var({_VARIABLES[match[0]]})", style)


def label(text: object) -> str:
    """Text from outside as a one-line label."""
    return " ".join(clean(text).split())
