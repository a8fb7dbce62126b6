"""The README's and the documents' figures: tables in Markdown, made from a run's rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .measured import KINDS, RESULTS, ROOT, Result, read, row_of, rows_of, said
from .tables import TITLES
from .timing import geometric_mean

SHOWN = ["Karpathy's batch", "small", "batch 1"]
PAGES = [ROOT / "README.md", ROOT / "docs" / "drop-in.md"]


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(said(x) for x in line) + " |" for line in lines)


def _source(result: Result) -> str:
    return (
        f"{result['processor']}, {result['threads']} threads, torch {result['torch']}, "
        f"{result['date']}, commit {result['commit'][:7]}"
    )


def cpu_table(result: Result) -> str:
    """The README's: some cases, and the means over all."""
    named = {
        **{f"{case}, {kind}": (kind, case) for kind in KINDS for case in SHOWN},
        "a step a call: 2x512, batch 1": ("a step a call", "2x512, batch 1"),
        **{
            f"{what}: {SHOWN[0]}, fp32": (what, f"{SHOWN[0]}, fp32")
            for what in ("a training step", "MB held for backward", "MB at the most in a step")
        },
    }
    found = {text: _first(result, *where) for text, where in named.items()}
    rows = {text: row for text, row in found.items() if row}
    names = [name for name in TITLES if any(name in row for row in rows.values())]
    lines = [[text, *(row.get(name) for name in names)] for text, row in rows.items()]
    means = []
    for kind in KINDS:
        grid = rows_of(result, kind)
        alone = geometric_mean(r["torch"] / r["fastlstm"] for r in grid)
        text = f"{kind} {alone:.2f}"
        if any(r.get("onnxruntime") for r in grid):
            text += f" ({geometric_mean(r['ratio'] for r in grid):.2f} of the faster of both)"
        means.append(text)
    missed = sum(row.get("met") == "missed" for row in result["rows"])
    unknown = sum(row.get("met") == "not known" for row in result["rows"])
    targets = sum(bool(row.get("target")) for row in result["rows"])
    rates = ", ".join(
        f"{re.sub('2x512, ', '', row['case']).replace(': ', ' ')}"
        for row in rows_of(result, "generate")
    )
    return (
        f"{_source(result)}. Milliseconds:\n\n"
        + markdown(["problem", *(TITLES[name] for name in names)], lines)
        + f"\n\nnn.LSTM's time over ours, geometric means over the grid: {'; '.join(means)}. "
        f"Drawing text, 2x512: {rates}. "
        f"{missed} of {targets} targets of the design are missed"
        + (f", {unknown} not known." if unknown else ".")
    )


def _first(result: Result, what: str, case: str) -> dict[str, Any]:
    """The row of that case, or else the first whose case begins so."""
    rows = rows_of(result, what)
    exact = [row for row in rows if row["case"] == case]
    return next(iter(exact or [row for row in rows if row["case"].startswith(case)]), {})


def packed_table(result: Result) -> str:
    rows = rows_of(result, "training, packed")
    cases = list(dict.fromkeys(re.split(", (?:padded|packed)", r["case"])[0] for r in rows))
    forms = ["padded", "packed, all of length T", "packed, lengths 1 to T"]
    lines = []
    for case in cases:
        own = [row_of(result, "training, packed", f"{case}, {form}") for form in forms]
        lines.append([case, *(r["fastlstm"] for r in own), *(r["torch"] for r in own)])
    head = ["problem", *(f"fastlstm {f}" for f in forms), *(f"nn.LSTM {f}" for f in forms)]
    return f"{_source(result)}. Milliseconds a training step:\n\n" + markdown(head, lines)


def recomputation_table(result: Result) -> str:
    lines = []
    for row in rows_of(result, "recomputation"):
        found = re.fullmatch(r"(.*), (\S+): (\S+) MB", row["case"])
        assert found is not None
        lines.append([found[1], found[2], row["fastlstm"], float(found[3])])
    head = ["training step", "recomputed", "ms", "MB at the most"]
    return f"{_source(result)}:\n\n" + markdown(head, lines)


FIGURES: dict[str, Callable[[Result], str]] = {
    "cpu": cpu_table, "packed": packed_table, "recomputation": recomputation_table,
}  # fmt: skip
MARKED = re.compile(r"<!-- measured: (\w+), (\S+) -->\n.*?<!-- end -->", re.S)


def filled(text: str, file: str | None = None) -> str:
    """A page with the figures that its markers name, from the files that they name or from this."""

    def figures(found: re.Match[str]) -> str:
        name, source = found[1], file or found[2]
        body = FIGURES[name](read(RESULTS / source))
        return f"<!-- measured: {name}, {source} -->\n{body}\n<!-- end -->"

    return MARKED.sub(figures, text)
