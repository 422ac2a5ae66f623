"""Labels beside points of a plot, none of which overlaps another, a point or an error bar."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties

from agentark_jax.report.svg import MUTED, Canvas, label

_LINE = 14.0  # height of a line of text in pixels
_FONT = FontProperties(size=12)
_NEAR = 14.0  # a label further away than this gets a line to its point


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def inside(self, other: "Box") -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)

    def touched_by(self, start: tuple[float, float], end: tuple[float, float]) -> bool:
        steps = max(2, int(math.dist(start, end) / 3))
        across, up = end[0] - start[0], end[1] - start[1]
        return any(
            self.left < start[0] + across * k / steps < self.right
            and self.bottom < start[1] + up * k / steps < self.top
            for k in range(steps + 1)
        )


def arrange(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], frame: Box
) -> list[Box] | None:
    """A box of `sizes[i]` near `points[i]` for every point, all in pixels: disjoint, inside `frame`, off `obstacles`.

    Greedy and deterministic: from the top down the nearest free place for each label, if possible one that the line to
    its point reaches without crossing a label. None when some label finds no place.
    """
    placed: dict[int, Box] = {}
    for index in sorted(range(len(points)), key=lambda index: (-points[index][1], points[index][0], index)):
        (x, y), (width, height) = points[index], sizes[index]
        taken = [*obstacles, *placed.values()]
        free = [
            box
            for box in _candidates(x, y, width, height, math.hypot(frame.right, frame.top))
            if box.inside(frame) and not any(box.overlaps(other) for other in taken)
        ]
        reached = (
            box for box in free if not any(other.touched_by((x, y), box.nearest(x, y)) for other in placed.values())
        )
        if not free:
            return None
        placed[index] = next(reached, free[0])
    return [placed[index] for index in range(len(points))]


def _candidates(x: float, y: float, width: float, height: float, reach: float) -> Iterable[Box]:
    """Boxes around (x, y), near ones first; right and left before above and below."""
    for step in range(int(reach / 6)):
        radius = 9 + 6 * step
        for degrees in (0, 180, 30, 330, 150, 210, 60, 300, 120, 240, 90, 270):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            centre_x = x + across * radius + (math.copysign(width / 2, across) if abs(across) > 0.1 else 0)
            centre_y = y + up * (radius + height / 2)
            yield Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)


def place(canvas: Canvas, texts: Sequence[str], spots: Sequence[tuple[float, float, float, float]]) -> list[Box] | None:
    """Writes `texts[i]` beside the point `spots[i]` = (x, y, low, high) in data units; the axes' limits must be set.

    Returns the boxes in pixels, or None (and draws nothing) when they do not fit.
    """
    renderer = FigureCanvasAgg(canvas.figure).get_renderer()
    axes = canvas.axes
    wrapped = [
        textwrap.wrap(label(text), 15 if canvas.narrow else 24, max_lines=3, placeholder="…") or [""] for text in texts
    ]
    points: list[tuple[float, float]] = []
    sizes: list[tuple[float, float]] = []
    markers: list[Box] = []
    bars: list[Box] = []
    for (x, y, low, high), lines in zip(spots, wrapped, strict=True):
        across, up = (float(value) for value in axes.transData.transform((x, y)))
        bottom, top = (float(axes.transData.transform((x, value))[1]) for value in (low, high))
        points.append((across, up))
        markers.append(Box(across - 6, up - 6, across + 6, up + 6))
        bars.append(Box(across - 4, bottom - 2, across + 4, top + 2))
        widths = [renderer.get_text_width_height_descent(line, _FONT, ismath=False)[0] for line in lines]
        sizes.append((max(widths) + 4, _LINE * len(lines) + 2))
    frame = axes.get_window_extent(renderer)
    room = Box(frame.x0, frame.y0 + 2, frame.x1 + 10, frame.y1 + 12)
    # Where many bars leave no gap of a label's width, labels may lie on bars, but never on points or on each other.
    boxes = arrange(points, sizes, [*markers, *bars], room) or arrange(points, sizes, markers, room)
    if boxes is None:
        return None
    for (x, y), box, lines in zip(points, boxes, wrapped, strict=True):
        _write(canvas, x, y, box, lines)
    return boxes


def _write(canvas: Canvas, x: float, y: float, box: Box, lines: Sequence[str]) -> None:
    # Each line is its own text element, anchored on the side of the point: the page's font is narrower than ours.
    if box.left >= x:
        side, edge = "left", box.left + 2
    elif box.right <= x:
        side, edge = "right", box.right - 2
    else:
        side, edge = "center", (box.left + box.right) / 2
    for index, line in enumerate(lines):
        canvas.axes.annotate(
            line,
            (edge, box.top - 1 - _LINE * (index + 0.8)),
            xycoords="figure pixels",
            annotation_clip=False,
            ha=side,
            va="baseline",
            fontsize=12,
        )
    near = box.nearest(x, y)
    if math.dist((x, y), near) > _NEAR:
        canvas.axes.annotate(
            "",
            (x, y),
            near,
            xycoords="figure pixels",
            textcoords="figure pixels",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5},
        )
