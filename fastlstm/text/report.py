"""report.html: a page of the run that refreshes itself while it trains, in one file.

Scripts cannot read other files beside a page that was opened from a disk, so the trainer replaces
the whole page every few seconds and the page loads itself again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import pages

EVERY = 5  # seconds between two loads of the page
POINTS = 300  # of a curve: more than the eye tells apart
SAMPLES = 60  # of a run; between the first and the last, evenly spread
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 320, 52, 52, 12, 40
LN2 = math.log(2)


@dataclass
class State:
    """What a page says of a run beside its losses.

    Attributes:
        name: of the run.
        status: "training", or how it ended.
        step, total, epoch, seconds, rate: where it stands.
        best: lowest validation loss in nats, or None.
        settings: names and values.
        commands: what to type next, as pairs of a purpose and a command.
    """

    name: str
    status: str
    step: int
    total: int
    epoch: float
    seconds: float
    rate: float
    best: float | None
    settings: dict[str, Any]
    commands: list[tuple[str, str]]


def report(state: State, metrics: Any, samples: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        metrics: a run's ``Metrics``, with the curves.
        samples: in order, objects with ``step`` and ``text``.
    """
    live = state.status == "training"
    now = time.time()
    left = state.seconds / state.step * (state.total - state.step) if state.step else 0.0
    remaining = f", about {_duration(left)} to go" if live and state.step else ""
    body = (
        f'<header><h1>{pages.text(state.name)}</h1>\n<p id="status" role="status" '
        f'data-live="{int(live)}" data-written="{now:.0f}" data-every="{EVERY}">'
        f"{pages.text(state.status)}{remaining}</p>\n"
        f'<progress max="{state.total}" value="{state.step}" aria-label="steps done"></progress>'
        f"</header>\n<main>\n{_figures(state, metrics)}"
        f"{_curves(metrics)}{_samples(samples)}"
        f"<h2>Go on</h2>\n{_commands(state.commands)}"
        f"<h2>Settings</h2>\n{pages.table([], _settings(state.settings), numbers=False)}"
        "</main>"
    )
    return pages.page(f"{state.name}: {state.status}", body, SCRIPT, STYLE, EVERY * live)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else (
        f"{rest} s"
    )  # fmt: skip


def _bits(nats: float) -> str:
    return f"{nats:.3f} nats, {nats / LN2:.3f} bits"


def _figures(state: State, metrics: Any) -> str:
    recent = metrics.train[-100:]
    values = [
        ("step", f"{state.step:,} of {state.total:,}"),
        ("epochs", f"{state.epoch:.2f}"),
        ("time", _duration(state.seconds)),
        ("characters a second", f"{state.rate:,.0f}"),
    ]
    if recent:
        values.append((f"training loss, last {len(recent)}", _bits(sum(recent) / len(recent))))
    if state.best is not None:
        values.append(("best validation loss", _bits(state.best)))
    cards = "".join(f"<div><dt>{a}</dt><dd>{b}</dd></div>\n" for a, b in values)
    return f'<dl class="cards">\n{cards}</dl>\n'


def _settings(settings: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for name, value in settings.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        rows.append([name, "none" if shown is None else shown])
    return rows


def _commands(commands: list[tuple[str, str]]) -> str:
    return "".join(f"<p>{pages.text(a)}</p><pre>{pages.text(b)}</pre>\n" for a, b in commands)


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    if not samples:
        return ""
    if len(samples) > SAMPLES:
        samples = [samples[j * (len(samples) - 1) // (SAMPLES - 1)] for j in range(SAMPLES)]
    items = "".join(
        f"<li><p>step {sample['step']:,}</p><pre>{pages.text(sample['text'])}</pre></li>\n"
        for sample in reversed(samples)
    )
    return (
        "<h2>Samples over time</h2>\n"
        '<p id="pick" hidden><label>step <input type="range" id="which" min="0" value="0" '
        f'max="{len(samples) - 1}"></label> <output id="when"></output></p>\n'
        f'<ol id="samples">\n{items}</ol>\n'
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


def _curves(metrics: Any) -> str:
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
    listed = pages.table(["step", "validation, nats", "bits"], evaluations) if evaluations else ""
    return (
        '<h2>Loss</h2>\n<div id="curves">'
        '<p><label><input type="radio" name="axis" id="to-linear" checked> steps</label> '
        '<label><input type="radio" name="axis" id="to-log"> logarithm of steps</label> '
        '<output id="here" class="muted"></output></p>\n'
        f"{charts}</div>\n{pages.data('points', points)}"
        + (f"<details><summary>Evaluations</summary>{listed}</details>\n" if listed else "")
    )


def _nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two numbers."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / about))
    size = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about)
    first = math.ceil(low / size - 1e-9)
    return [j * size for j in range(first, math.floor(high / size + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    found = [m * 10.0**p for p in range(19) for m in (1, 2, 5)]
    found = [x for x in found if low <= x <= high]
    return found if len(found) <= 9 else [x for x in found if math.log10(x) % 1 < 1e-9]


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


STYLE = """
progress { width: 100%; accent-color: var(--one); }
#curves:has(#to-linear:checked) #log, #curves:has(#to-log:checked) #linear { display: none; }
#curves figure { overflow-x: auto; } #curves svg { min-width: 34rem; }
#pick:not([hidden]) + #samples li p { display: none; }
#samples { list-style: none; padding: 0; } #samples li p { color: var(--muted); }
#pick label { display: inline-flex; gap: .6rem; width: 70%; } #which { flex: 1; }
"""

SCRIPT = """
"use strict";
const get = id => document.getElementById(id);
const memory = {  // what the reader chose outlives a reload, where the browser lets it
  read(name) { try { return sessionStorage.getItem(name + location.pathname); }
               catch { return null; } },
  write(name, value) { try { sessionStorage.setItem(name + location.pathname, value); }
                       catch { /* then it does not */ } },
};

const status = get("status"), said = status.textContent;
let busy = 0;  // when the reader last did something that a reload would break
function pass() {
  const age = Date.now() / 1000 - status.dataset.written;
  const lost = age > Math.max(120, 12 * status.dataset.every);
  status.textContent = said + (lost
    ? `: no news for ${Math.round(age / 60)} min, so it was stopped or is busy elsewhere`
    : `, seen ${Math.max(0, Math.round(age))} s ago`);
  const reading = Date.now() - busy < 4000 || String(getSelection()) !== "";
  const due = performance.now() / 1000 > status.dataset.every * (lost ? 6 : 1);
  if (due && !document.hidden && !reading) location.reload();
}
if (status.dataset.live === "1") {
  pass();
  setInterval(pass, Math.min(2000, 400 * status.dataset.every));
}

const items = [...document.querySelectorAll("#samples li")].reverse(), which = get("which");
if (which) {
  get("pick").hidden = false;
  const show = () => {
    items.forEach((item, j) => { item.hidden = j !== Number(which.value); });
    get("when").textContent = items[which.value].querySelector("p").textContent;
    which.setAttribute("aria-valuetext", get("when").textContent);
  };
  const kept = memory.read("step");
  const place = kept === null ? -1
    : items.findIndex(item => item.querySelector("p").textContent === kept);
  which.value = place < 0 ? items.length - 1 : place;
  which.addEventListener("input", () => {
    busy = Date.now();
    show();
    const newest = Number(which.value) === items.length - 1;  // follows what comes
    memory.write("step", newest ? "" : get("when").textContent);
  });
  show();
}

const points = get("points") ? JSON.parse(get("points").textContent) : [];
["linear", "log"].forEach((name, axis) => {
  const figure = get(name), choice = get("to-" + name);
  if (!figure) return;
  if (memory.read("axis") === name) choice.checked = true;
  choice.addEventListener("change", () => memory.write("axis", name));
  const svg = figure.querySelector("svg"), cross = get("cross-" + axis);
  svg.addEventListener("pointermove", event => {
    busy = Date.now();
    const x = (event.clientX - svg.getBoundingClientRect().left)
      / svg.getBoundingClientRect().width * svg.viewBox.baseVal.width;
    const near = points[axis].reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cross.setAttribute("x1", near[0]);
    cross.setAttribute("x2", near[0]);
    cross.setAttribute("visibility", "visible");
    get("here").textContent = `step ${near[1].toLocaleString("en")}: training ${near[2]} nats`
      + (near[3] === null ? "" : `, validation ${near[3]}`);
  });
  svg.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    get("here").textContent = "";
  });
});
"""
