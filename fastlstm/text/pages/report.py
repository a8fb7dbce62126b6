"""report.html: a page of the run that refreshes itself while it trains, in one file.

Scripts cannot read other files beside a page that was opened from a disk, so the trainer replaces
the whole page every few seconds and the page loads itself again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import markup
from .curves import LN2, curves

EVERY = 5  # seconds between two loads of the page
SAMPLES = 60  # of a run; between the first and the last, evenly spread


@dataclass
class Snapshot:
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


def report(snapshot: Snapshot, metrics: Any, samples: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        metrics: a run's ``Metrics``, with the curves.
        samples: in order, objects with ``step`` and ``text``.
    """
    live = snapshot.status == "training"
    now = time.time()
    left = (
        snapshot.seconds / snapshot.step * (snapshot.total - snapshot.step)
        if snapshot.step
        else 0.0
    )
    remaining = f", about {_duration(left)} to go" if live and snapshot.step else ""
    body = (
        f'<header><h1>{markup.text(snapshot.name)}</h1>\n<p id="status" role="status" '
        f'data-live="{int(live)}" data-written="{now:.0f}" data-every="{EVERY}">'
        f"{markup.text(snapshot.status)}{remaining}</p>\n"
        f'<progress max="{snapshot.total}" value="{snapshot.step}" '
        'aria-label="steps done"></progress>'
        f"</header>\n<main>\n{_figures(snapshot, metrics)}"
        f"{curves(metrics)}{_samples(samples)}"
        f"<h2>Go on</h2>\n{_commands(snapshot.commands)}"
        f"<h2>Settings</h2>\n{markup.table([], _settings(snapshot.settings), numbers=False)}"
        "</main>"
    )
    return markup.page(f"{snapshot.name}: {snapshot.status}", body, SCRIPT, STYLE, EVERY * live)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else (
        f"{rest} s"
    )  # fmt: skip


def _bits(nats: float) -> str:
    return f"{nats:.3f} nats, {nats / LN2:.3f} bits"


def _figures(snapshot: Snapshot, metrics: Any) -> str:
    recent = metrics.train[-100:]
    values = [
        ("step", f"{snapshot.step:,} of {snapshot.total:,}"),
        ("epochs", f"{snapshot.epoch:.2f}"),
        ("time", _duration(snapshot.seconds)),
        ("characters a second", f"{snapshot.rate:,.0f}"),
    ]
    if recent:
        values.append((f"training loss, last {len(recent)}", _bits(sum(recent) / len(recent))))
    if snapshot.best is not None:
        values.append(("best validation loss", _bits(snapshot.best)))
    cards = "".join(f"<div><dt>{a}</dt><dd>{b}</dd></div>\n" for a, b in values)
    return f'<dl class="cards">\n{cards}</dl>\n'


def _settings(settings: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for name, value in settings.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        rows.append([name, "none" if shown is None else shown])
    return rows


def _commands(commands: list[tuple[str, str]]) -> str:
    return "".join(f"<p>{markup.text(a)}</p><pre>{markup.text(b)}</pre>\n" for a, b in commands)


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    if not samples:
        return ""
    if len(samples) > SAMPLES:
        samples = [samples[j * (len(samples) - 1) // (SAMPLES - 1)] for j in range(SAMPLES)]
    items = "".join(
        f"<li><p>step {sample['step']:,}</p><pre>{markup.text(sample['text'])}</pre></li>\n"
        for sample in reversed(samples)
    )
    return (
        "<h2>Samples over time</h2>\n"
        '<p id="pick" hidden><label>step <input type="range" id="which" min="0" value="0" '
        f'max="{len(samples) - 1}"></label> <output id="when"></output></p>\n'
        f'<ol id="samples">\n{items}</ol>\n'
    )


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

const status = get("status"), text = status.textContent;
let busy = 0;  // when the reader last did something that a reload would break
function pass() {
  const age = Date.now() / 1000 - status.dataset.written;
  const lost = age > Math.max(120, 12 * status.dataset.every);
  status.textContent = text + (lost
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
