"""Line charts of the pages: where everything goes, thinned to what the eye can tell apart.

``templates/charts.html`` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scale import LN2

POINTS = 300  # of a line
MARKED = 60  # points of a line that each get a mark; of more, only some do
MARKS = 12
LEFT, TOP, BOTTOM = 56, 10, 40
SHAPES = ("disc", "square", "triangle", "diamond", "cross", "plus")


@dataclass
class Line:
    """A line of a chart.

    Attributes:
        label: its name in the legend.
        x, y: its points, x ascending.
        style: from 0, which of the six colours with their dashes and marks.
        marked: whether points get marks.
        spread: whether a band shows the extremes of what was thinned.
        points: at most; of fewer each is the mean of more.
    """

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    style: int = 0
    marked: bool = False
    spread: bool = False
    points: int = POINTS


def thin(x: np.ndarray, y: np.ndarray, logarithmic: bool, points: int = POINTS) -> np.ndarray:
    """Columns x, mean, least and largest y of at most so many stretches of an ascending x."""
    u = np.log(x) if logarithmic else x.astype(float)
    span = max(u[-1] - u[0], 1e-12)
    stretch = np.minimum((u - u[0]) / span * points, points - 1).astype(int)
    starts = np.flatnonzero(np.diff(stretch, prepend=-1))
    counts = np.diff(starts, append=len(x))
    parts = (np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts,
             np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))  # fmt: skip
    return np.stack(parts, axis=1)


def _nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two numbers."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / about))
    size = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about)
    first = math.ceil(low / size - 1e-9)
    return [j * size for j in range(first, math.floor(high / size + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    ticks = [m * 10.0**p for p in range(19) for m in (1, 2, 5)]
    ticks = [x for x in ticks if low <= x <= high]
    return ticks if len(ticks) <= 9 else [x for x in ticks if math.log10(x) % 1 < 1e-9]


def _path(x: Any, y: Any) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def chart(
    name: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    title: str = "",
    logarithmic: bool = False,
    bits: bool = False,
    settled: bool = False,
    size: tuple[int, int] = (760, 320),
) -> dict[str, Any]:
    """What the template ``chart`` draws of lines that are not empty.

    Args:
        name: the figure's id.
        logarithmic: of the horizontal axis.
        bits: whether y is in nats, and a second axis shows bits.
        settled: whether what a line does in its first twentieth may leave the picture.
        size: of the drawing.
    """
    width, height = size
    right, bottom = width - (LEFT if bits else 22), height - BOTTOM
    curves = [thin(np.asarray(line.x, float), np.asarray(line.y, float), logarithmic, line.points)
              for line in lines]  # fmt: skip
    first, last = min(c[0, 0] for c in curves), max(c[-1, 0] for c in curves)
    # A later part of each line decides how high the chart reaches, where the first is far above.
    begin = first + 0.05 * (last - first) if settled else first
    ys = np.concatenate([part if len(part := c[c[:, 0] >= begin, 1]) else c[-1:, 1]
                         for c in curves])  # fmt: skip
    low, high = float(ys.min()), float(ys.max())
    pad = max(0.04 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-9)
    low, high = (max(0.0, low - pad) if low >= 0 else low - pad), high + pad

    def px(x: Any) -> Any:
        a, b, c = (np.log(v) if logarithmic else v for v in (x, first, last))
        return LEFT + (a - b) / max(c - b, 1e-12) * (right - LEFT)

    def py(y: Any) -> Any:
        return TOP + (high - y) / (high - low) * (bottom - TOP)

    def ticks(values: list[float], place: Any, form: str) -> list[tuple[float, str]]:
        return [(round(float(place(v)), 1), format(v, form)) for v in values]

    x_values = _decades(first, last) if logarithmic else _nice(first, last, 4 + (width > 500))
    drawn = []
    for line, c in zip(lines, curves, strict=True):
        xs = px(c[:, 0])
        every = 1 if len(c) <= MARKED else math.ceil(len(c) / MARKS)
        drawn.append({
            "label": line.label,
            "style": f"c{line.style % len(SHAPES) + 1}",
            "shape": SHAPES[(line.style + line.style // len(SHAPES)) % len(SHAPES)],
            "points": _path(xs, py(c[:, 1])),
            "band": line.spread
            and _path(xs, py(c[:, 3])) + " " + _path(xs[::-1], py(c[::-1, 2])),
            "marks": [(round(float(a), 1), round(float(b), 1))
                      for a, b in zip(xs[::every], py(c[::every, 1]), strict=True)]
            if line.marked else [],
        })  # fmt: skip
    return {
        "id": name, "title": title, "width": width, "height": height,
        "left": LEFT, "right": right, "top": TOP, "bottom": bottom, "middle": (TOP + bottom) / 2,
        "x_label": x_label, "y_label": y_label, "right_label": "bits a character" if bits else "",
        "x_ticks": ticks(x_values, px, ",.0f" if last >= 10 else ".3g"),
        "y_ticks": ticks(_nice(low, high), py, ".3g"),
        "right_ticks": ticks(_nice(low / LN2, high / LN2), lambda v: py(v * LN2), ".3g")
        if bits else [],
        "lines": drawn,
        "words": "; ".join(f"{line.label}: {_short(c[-1, 1])} at {x_label} {c[-1, 0]:,.0f}"
                           for line, c in zip(lines, curves, strict=True)),
        "places": _places(lines, curves, x_label, px),
    }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _places(
    lines: Sequence[Line], curves: Sequence[np.ndarray], x_label: str, px: Any
) -> dict[str, Any]:
    """For the script: places along x, and of each line the last value that it had by then."""
    at = max(curves, key=lambda c: (c[-1, 0], len(c)))[:, 0]
    values = []
    for line, c in zip(lines, curves, strict=True):
        j = np.searchsorted(c[:, 0], at, side="right") - 1
        shown = [_short(float(c[k, 1])) if k >= 0 else None for k in j]
        values.append([line.label, shown])
    return {
        "name": x_label,
        "px": [round(float(x), 1) for x in px(at)],
        "at": [round(float(x)) if float(x) >= 10 else round(float(x), 2) for x in at],
        "lines": values,
    }
