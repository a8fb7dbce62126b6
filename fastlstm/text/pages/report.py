"""report.html: a page of the run that refreshes itself while it trains, in one file.

Scripts cannot read other files beside a page that was opened from a disk, so the trainer replaces
the whole page every few seconds and the page loads itself again.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .charts import Line, chart
from .markup import render
from .scale import LN2, NATS, Scale

EVERY = 5  # seconds between two loads of the page
SAMPLES = 60  # of a run; between the first and the last, evenly spread
EVALUATIONS = 200  # the last ones, in the table


@dataclass
class Snapshot:
    """What a page says of a run beside its losses.

    Attributes:
        name: of the run.
        status: "training", or how it ended.
        step, total, epoch, seconds, rate: where it stands.
        best: lowest validation loss in nats, or None.
        settings: names and values.
        about: the run's commands, machine and text, as of its about.json; empty in older runs.
        commands: what to type next, as pairs of a purpose and a command.
        scale: what losses are shown in.
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
    about: dict[str, Any]
    commands: list[tuple[str, str]]
    scale: Scale = NATS


def report(snapshot: Snapshot, metrics: Any, samples: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        metrics: a run's ``Metrics``, with the curves.
        samples: in order, objects with ``step`` and ``text``.
    """
    live = snapshot.status == "training"
    remaining = ""
    if live and snapshot.step:
        left = snapshot.seconds / snapshot.step * (snapshot.total - snapshot.step)
        remaining = f", about {duration(left)} to go"
    if len(samples) > SAMPLES:
        samples = [samples[j * (len(samples) - 1) // (SAMPLES - 1)] for j in range(SAMPLES)]
    return render(
        "report.html",
        ("report.css",),
        ("charts.js", "copy.js", "report.js"),
        run=snapshot,
        live=live,
        every=EVERY,
        written=round(time.time()),
        remaining=remaining,
        cards=_cards(snapshot, metrics),
        loss=_loss(metrics, snapshot.scale),
        more=_more(metrics, snapshot.settings.get("clip_norm", 0), snapshot.scale),
        evaluations=_evaluations(metrics, snapshot.scale),
        samples=samples,
        settings=[[name, shown(value)] for name, value in snapshot.settings.items()],
        machine=facts(snapshot.about, "machine"),
        text=facts(snapshot.about, "text"),
    )


def _evaluations(metrics: Any, scale: Scale) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: in bits a byte the validation loss is in nats a token as well."""
    last = list(evaluations(metrics, scale))[-EVALUATIONS:]
    if scale.in_bytes:
        unit, second, factor = scale.label, f"nats a {scale.each}", 1 / scale.val
    else:
        unit, second, factor = "nats", "bits", 1 / LN2
    return (
        ["step", f"validation, {unit}", second, f"training, {unit}", f"gap, {unit}"],
        [[f"{s:,}", f"{v:.4f}", f"{v * factor:.4f}", f"{t:.4f}", f"{v - t:+.4f}"]
         for s, v, t in last],
    )  # fmt: skip


def facts(about: dict[str, Any], part: str) -> list[list[str]]:
    """Rows of a table."""
    return [[name, counted(value)] for name, value in about.get(part, {}).items()]


def duration(seconds: float) -> str:
    """In words that a glance takes in."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else (
        f"{rest} s"
    )  # fmt: skip


def shown(value: Any) -> str:
    """A setting's value as its flag takes it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def counted(value: Any) -> str:
    """A fact's value."""
    return f"{value:,}" if type(value) is int else shown(value)


def _cards(snapshot: Snapshot, metrics: Any) -> list[tuple[str, str, str]]:
    """Name, value and a second line of the figures at the top."""
    recent, scale = metrics.train[-100:], snapshot.scale
    cards = [
        ("step", f"{snapshot.step:,} of {snapshot.total:,}", ""),
        ("epochs", f"{snapshot.epoch:.2f}", ""),
        ("time", duration(snapshot.seconds), ""),
    ]
    if snapshot.rate:  # none yet where a run goes on
        cards.append((f"{scale.each}s a second", f"{snapshot.rate:,.0f}", ""))
    losses = {}
    if recent:
        losses[f"training loss, last {len(recent)}"] = sum(recent) / len(recent), scale.train
    if snapshot.best is not None:
        losses["best validation loss"] = snapshot.best, scale.val
    for name, (nats, factor) in losses.items():
        if scale.in_bytes:
            small = f"a byte; {nats:.3f} nats a {scale.each}"
            cards.append((name, f"{nats * factor:.3f} bits", small))
        else:
            cards.append((name, f"{nats:.3f} nats", f"{nats / LN2:.3f} bits"))
    gaps = [val - train for _, val, train in evaluations(metrics, scale)]
    if gaps:
        unit = scale.label if scale.in_bytes else "nats"
        small = f"{unit}, validation minus training"
        cards.append(("generalisation gap", f"{gaps[-1]:+.3f}", small))
    return cards


def evaluations(metrics: Any, scale: Scale) -> Iterator[tuple[int, float, float]]:
    """Step, validation loss, and the mean training loss since the evaluation before."""
    begin = 0
    for step, val in zip(metrics.val_steps, metrics.val, strict=True):
        end = bisect.bisect_right(metrics.steps, step)
        train = sum(metrics.train[begin:end]) / max(1, end - begin)
        yield step, val * scale.val, train * scale.train
        begin = end


def _loss(metrics: Any, scale: Scale) -> list[dict[str, Any]]:
    """The losses over the steps and over their logarithm."""
    if not metrics.steps:
        return []
    train, val = np.array(metrics.train) * scale.train, np.array(metrics.val) * scale.val
    lines = [Line("training", metrics.steps, train, 0, spread=True)]
    if metrics.val_steps:
        lines.append(Line("validation", metrics.val_steps, val, 1, marked=True))
    return [chart(name, lines, "step", scale.label, logarithmic=name == "log",
                  bits=not scale.in_bytes)
            for name in ("linear", "log")]  # fmt: skip


def _more(metrics: Any, clip: float, scale: Scale) -> list[dict[str, Any]]:
    """Small charts: the generalisation gap, the learning rate and the gradient's norm."""
    steps, charts = np.array(metrics.steps), []

    def add(name: str, title: str, y_label: str, *lines: Line) -> None:
        charts.append(chart(name, lines, "step", y_label, title=title, size=(340, 220)))

    if metrics.val_steps:
        gaps = [val - train for _, val, train in evaluations(metrics, scale)]
        line = Line("validation minus training", metrics.val_steps, gaps, 2, marked=True)
        add("gap", "Generalisation gap", scale.label, line)
    rates, norms = np.array(metrics.rates), np.array(metrics.norms)
    if (known := np.isfinite(rates)).any():
        line = Line("learning rate", steps[known], rates[known], 3)
        add("rate", "Learning rate", "", line)
    if (known := np.isfinite(norms)).any():
        lines = [Line("norm", steps[known], norms[known], 0, spread=True)]
        if clip:
            ends = steps[known][[0, -1]]
            lines.append(Line("limit", ends, [clip, clip], 1))
        add("norm", "Length of the gradient", "", *lines)
    return charts
