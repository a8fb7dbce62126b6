"""The curves of report.html: a run's losses as SVG, thinned to what the eye can tell apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import markup

POINTS = 300  # of a curve
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 320, 52, 52, 12, 40
LN2 = math.log(2)


def curves(metrics: Any) -> str:
    """The loss over the steps and over their logarithm, points for the page's script, a table."""
    if not metrics.steps:
        return "<h2>Loss</h2>\n<p>The first step is under way.</p>\n"
    steps, train = np.array(metrics.steps), np.array(metrics.train)
    val_steps, val = np.array(metrics.val_steps), np.array(metrics.val)
    charts, points = "", []
    for logarithmic in (False, True):
        name = "log" if logarithmic else "linear"
        curve = thin(steps, train, logarithmic)
        drawing, places = _chart(curve, val_steps, val, logarithmic)
        points.append(places)
        charts += f'<figure id="{name}">{drawing}</figure>\n'
    evaluations = [
        [f"{s:,}", f"{v:.4f}", f"{v / LN2:.4f}"]
        for s, v in list(zip(metrics.val_steps, metrics.val, strict=True))[-200:]
    ]
    listed = markup.table(["step", "validation, nats", "bits"], evaluations) if evaluations else ""
    return (
        '<h2>Loss</h2>\n<div id="curves">'
        '<p><label><input type="radio" name="axis" id="to-linear" checked> steps</label> '
        '<label><input type="radio" name="axis" id="to-log"> logarithm of steps</label> '
        '<output id="here" class="muted"></output></p>\n'
        f"{charts}</div>\n{markup.data('points', points)}"
        + (f"<details><summary>Evaluations</summary>{listed}</details>\n" if listed else "")
    )


def thin(x: np.ndarray, y: np.ndarray, logarithmic: bool) -> np.ndarray:
    """Columns x, mean, least and largest y of at most POINTS stretches of an ascending x."""
    u = np.log(x) if logarithmic else x.astype(float)
    span = max(u[-1] - u[0], 1e-12)
    stretch = np.minimum((u - u[0]) / span * POINTS, POINTS - 1).astype(int)
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


def _chart(
    curve: np.ndarray, val_steps: np.ndarray, val: np.ndarray, logarithmic: bool
) -> tuple[str, list[Any]]:
    """An SVG drawing, and ``[x in it, step, training loss, validation loss]`` of its points."""
    first, last = float(curve[0, 0]), float(curve[-1, 0])
    ys = np.concatenate([curve[:, 1], val])
    low, high = float(ys.min()), float(ys.max())
    pad = max(0.04 * (high - low), 0.01)
    low, high = max(0.0, low - pad), high + pad

    def px(step: Any) -> Any:
        a, b, c = (np.log(v) if logarithmic else v for v in (step, first, last))
        return LEFT + (a - b) / max(c - b, 1e-12) * (WIDTH - LEFT - RIGHT)

    def py(nats: Any) -> Any:
        return TOP + (high - np.clip(nats, low, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(x: Any, y: Any) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    parts = []
    floor = HEIGHT - BOTTOM
    for tick in _decades(first, last) if logarithmic else _nice(first, last):
        x = px(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>'
                     f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">'
                     f"{tick:,.0f}</text>")  # fmt: skip
    for tick in _nice(low, high):
        y = py(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                     f"{tick:.3g}</text>")  # fmt: skip
    for tick in _nice(low / LN2, high / LN2):
        y = py(tick * LN2) + 4
        parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{y:.1f}">{tick:.3g}</text>')
    middle = (TOP + floor) / 2
    for x, words in ((12, "nats a character"), (WIDTH - 4, "bits a character")):
        parts.append(f'<text transform="translate({x} {middle}) rotate(-90)" '
                     f'text-anchor="middle">{words}</text>')  # fmt: skip
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    xs = px(curve[:, 0])
    band = path(xs, py(curve[:, 3])) + " " + path(xs[::-1], py(curve[::-1, 2]))
    parts.append(f'<polygon class="band" points="{band}"/>')
    parts.append(f'<polyline class="one" stroke-width="1.6" points="{path(xs, py(curve[:, 1]))}"/>')
    parts.append(f'<text class="one" x="{WIDTH - RIGHT - 8}" y="{TOP + 16}" '
                 'text-anchor="end">training</text>')  # fmt: skip
    words = f"Training loss {curve[-1, 1]:.3f} nats at step {last:,.0f}"
    if len(val):
        vx, vy = px(val_steps), py(val)
        parts.append(f'<polyline class="two" stroke-width="1.6" points="{path(vx, vy)}"/>')
        if len(val) <= 60:
            parts += [f'<circle class="two" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>'
                      for a, b in zip(vx, vy, strict=True)]  # fmt: skip
        parts.append(f'<text class="two" x="{WIDTH - RIGHT - 8}" y="{TOP + 32}" '
                     'text-anchor="end">validation</text>')  # fmt: skip
        words += f", validation loss {val[-1]:.3f} at step {val_steps[-1]:,}"
    parts.append(f'<line class="grid" id="cross-{int(logarithmic)}" visibility="hidden" '
                 f'y1="{TOP}" y2="{floor}"/>')  # fmt: skip
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
        f"{''.join(parts)}</svg>"
    )
    # Of each point the validation loss that was the last one then.
    at = np.searchsorted(val_steps, curve[:, 0], side="right") - 1
    places = [
        [round(float(x), 1), round(float(row[0])), round(float(row[1]), 4),
         round(float(val[j]), 4) if j >= 0 else None]
        for x, row, j in zip(xs, curve, at, strict=True)
    ]  # fmt: skip
    return drawing, places
