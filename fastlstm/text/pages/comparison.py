"""The page of ``fastlstm.compare``: runs laid over each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..alphabet import UNITS
from .charts import Line, chart
from .markup import render
from .report import counted, duration, evaluations, shown
from .scale import LN2, NATS, Scale, bits_a_byte

SMOOTH = 90  # points of a training loss, so that lines over each other can be told apart
SAMPLES = 60  # steps that the page has samples of
TIMES = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass
class Compared:
    """A run.

    Attributes:
        label: its name here.
        config: as of its config.json.
        metrics: a ``Metrics`` of at least one step.
        samples: in order, objects with ``step`` and ``text``.
        about: as of its about.json; empty in older runs.
        scale: what its losses are shown in.
    """

    label: str
    config: dict[str, Any]
    metrics: Any
    samples: Sequence[dict[str, Any]]
    about: dict[str, Any]

    scale: Scale = NATS

    @property
    def unit(self) -> str:
        return self.config.get("unit", "byte")

    @property
    def bytes_each(self) -> tuple[float, float] | None:
        """Bytes of a character or token on the text to train and to validate on, where known."""
        if self.unit == "byte":
            return 1.0, 1.0
        each, text = UNITS[self.unit].each if self.unit in UNITS else "", self.about.get("text", {})
        train = text.get(f"bytes a {each} to train on")
        val = text.get(f"bytes a {each} to validate on", train)
        known = all(isinstance(size, int | float) and size > 0 for size in (train, val))
        return (train, val) if known else None

    @property
    def step_size(self) -> float:
        """What a step reads: characters, or bytes where losses are in bits a byte."""
        size = self.config["batch_size"] * self.config["seq_length"]
        return size / (LN2 * self.scale.train) if self.scale.in_bytes else size

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the lowest validation loss, and that loss."""
        both = zip(self.metrics.val, self.metrics.val_steps, strict=True)
        nats, step = min(both, default=(0.0, 0))
        return (step, nats * self.scale.val) if step else None

    @property
    def last(self) -> float:
        """Mean training loss of the last hundred steps."""
        return float(np.mean(self.metrics.train[-100:])) * self.scale.train

    @property
    def seconds(self) -> float:
        return float(np.nan_to_num(self.metrics.seconds[-1]))

    @property
    def speed(self) -> float:
        """What it reads a second over the whole run, evaluations included."""
        return self.metrics.steps[-1] * self.step_size / max(self.seconds, 1e-9)


def scaled(runs: Sequence[Compared]) -> list[Compared]:
    """The runs with losses in bits a byte, where they read tokens or different units.

    A run of an older version does not say how many bytes its characters have: all stay in nats.
    """
    units, sizes = {run.unit for run in runs}, [run.bytes_each for run in runs]
    known = [size for size in sizes if size is not None]
    if len(known) < len(runs) or not ("bpe" in units or len(units) > 1):
        return list(runs)
    return [replace(run, scale=bits_a_byte(UNITS[run.unit].each, *size))
            for run, size in zip(runs, known, strict=True)]  # fmt: skip


def page(runs: Sequence[Compared]) -> str:
    """The page of two runs or more."""
    runs = scaled(runs)
    scale = runs[0].scale
    validated = any(len(run.metrics.val) for run in runs)
    kinds = ["validation"] * validated + ["training"]
    charts = [chart(f"{kind}-{axis}", lines, label, scale.label, bits=not scale.in_bytes,
                    settled=kind == "training")
              for axis, label in _axes(runs)
              for kind in kinds if (lines := _losses(runs, kind, axis))]  # fmt: skip
    steps = _sampled(runs)
    return render(
        "compare.html",
        ("compare.css",),
        ("charts.js", "copy.js", "compare.js"),
        title=" and ".join([", ".join(run.label for run in runs[:-1]), runs[-1].label]),
        notes=list(_notes(runs)),
        results=_results(runs),
        kinds=kinds,
        axes=[axis for axis, _ in _axes(runs)],
        charts=charts,
        more=_more(runs),
        names=[run.label for run in runs],
        settings=_differing([run.config for run in runs], shown, ("data_sha256",)),
        facts=_differing([{**run.about.get("machine", {}), **run.about.get("text", {})}
                          for run in runs], counted, ()),
        steps=steps,
        samples=[(run.label, [s for s in run.samples if s["step"] in steps] or run.samples[-1:])
                 for run in runs if run.samples],
        commands=[(run.label, words) for run in runs for words in run.about.get("commands", [])],
    )  # fmt: skip


def summary(runs: Sequence[Compared]) -> str:
    """The results as lines of text."""
    head, rows = _results(scaled(runs))
    cells = [head, *rows]
    widths = [max(len(row[j]) for row in cells) for j in range(len(head))]
    return "\n".join(
        "  ".join(value.rjust(width) if j else value.ljust(width)
                  for j, (value, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    )  # fmt: skip


def _results(runs: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what the runs came to, the lowest validation loss first."""
    in_bytes = runs[0].scale.in_bytes
    unit = "bits a byte" if in_bytes else "nats"
    head = ["run", f"best validation, {unit}", "bits", "at step", f"training, {unit}",
            f"gap, {unit}", "steps", "time", "bytes/s" if in_bytes else "characters/s",
            "parameters"]  # fmt: skip
    rows = []
    for run in sorted(runs, key=lambda run: run.best[1] if run.best else np.inf):
        best = ["-"] * 3
        if run.best:
            step, loss = run.best
            best = [f"{loss:.4f}", f"{loss / LN2:.4f}", f"{step:,}"]
        gaps = [f"{val - train:+.4f}" for _, val, train in evaluations(run.metrics, run.scale)]
        size = run.about.get("text", {}).get("parameters of the model")
        rows.append([run.label, *best, f"{run.last:.4f}", *(gaps[-1:] or ["-"]),
                     f"{run.metrics.steps[-1]:,}", duration(run.seconds), f"{run.speed:,.0f}",
                     "-" if size is None else counted(size)])  # fmt: skip
    if in_bytes:  # there is no other column of bits
        head, *rows = [[*row[:2], *row[3:]] for row in (head, *rows)]
    return head, rows


def _axes(runs: Sequence[Compared]) -> list[tuple[str, str]]:
    """What runs horizontally, and its label."""
    longest = max(run.seconds for run in runs)
    unit = next((name for name, size in TIMES if longest >= 2 * size), "seconds")
    read = "bytes" if runs[0].scale.in_bytes else "characters"
    return [("steps", "step"), ("time", unit), (read, f"million {read}")]


def _along(run: Compared, axis: str, unit: str) -> np.ndarray:
    """Where each step of a run lies on an axis."""
    steps = np.array(run.metrics.steps, float)
    if axis == "time":
        return np.array(run.metrics.seconds) / dict(TIMES)[unit]
    return steps if axis == "steps" else steps * run.step_size / 1e6


def _losses(runs: Sequence[Compared], kind: str, axis: str) -> list[Line]:
    unit = dict(_axes(runs))["time"]
    lines = []
    for j, run in enumerate(runs):
        x, y = _along(run, axis, unit), np.array(run.metrics.train) * run.scale.train
        if kind == "validation":
            x = x[np.searchsorted(run.metrics.steps, run.metrics.val_steps)]
            y = np.array(run.metrics.val) * run.scale.val
        known = np.isfinite(x) & np.isfinite(y)
        if known.any():
            lines.append(Line(run.label, x[known], y[known], j, marked=True, points=SMOOTH))
    return lines


def _more(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """Small charts by the step, of what the runs wrote down."""
    gaps: list[Line] = []
    rates: list[Line] = []
    norms: list[Line] = []
    for j, run in enumerate(runs):
        m, steps = run.metrics, np.array(run.metrics.steps)
        if gap := [val - train for _, val, train in evaluations(m, run.scale)]:
            gaps.append(Line(run.label, m.val_steps, gap, j, marked=True))
        for lines, column in ((rates, np.array(m.rates)), (norms, np.array(m.norms))):
            if (known := np.isfinite(column)).any():
                lines.append(Line(run.label, steps[known], column[known], j, True, points=SMOOTH))
    parts = (
        ("gap", "Generalisation gap: validation minus training", gaps),
        ("rate", "Learning rate", rates),
        ("norm", "Length of the gradient", norms),
    )
    return [chart(name, lines, "step", "", title=title, settled=name == "norm", size=(340, 220))
            for name, title, lines in parts if lines]  # fmt: skip


def _notes(runs: Sequence[Compared]) -> Iterator[str]:
    """What keeps the losses from being comparable."""
    units = {run.unit for run in runs}
    if runs[0].scale.in_bytes:
        yield "Losses are in bits a byte of text: a character or token of these runs is no byte."
    elif len(units) > 1:
        yield "The runs read different units, bytes and characters: compare no losses a character."
    if len({run.config.get("data_sha256") for run in runs}) > 1:
        yield "The runs were trained on different texts: their losses are not comparable."
    elif len({(run.config.get("val_fraction"), run.config.get("test_fraction"))
              for run in runs}) > 1:  # fmt: skip
        yield "The runs were validated on different parts of the text."
    machines = [{**run.about.get("machine", {}), "precision": None} for run in runs]
    if any(machine != machines[0] for machine in machines):
        yield "The runs were trained on different machines or threads: their times differ by that."


def _differing(
    values: Sequence[dict[str, Any]], as_text: Any, hidden: tuple[str, ...]
) -> list[list[str]]:
    """Rows of the names whose values are not the same in all runs."""
    names = dict.fromkeys(name for each in values for name in each if name not in hidden)
    rows = [[name, *(as_text(each[name]) if name in each else "-" for each in values)]
            for name in names]  # fmt: skip
    return [row for row in rows if len(set(row[1:])) > 1]


def _sampled(runs: Sequence[Compared]) -> list[int]:
    """Steps at which every run that has samples has one."""
    steps = [{sample["step"] for sample in run.samples} for run in runs if run.samples]
    common = sorted(set.intersection(*steps)) if steps else []
    if len(common) > SAMPLES:
        common = [common[j * (len(common) - 1) // (SAMPLES - 1)] for j in range(SAMPLES)]
    return common
