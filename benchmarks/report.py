"""Tables and charts of what was measured: ``python -m benchmarks.report JSON ...``.

Reads what the suite (pytest-benchmark's JSON, or the part of it that is kept) and
``benchmarks.gpu_check`` write. Makes one self-contained page and a PNG of every chart; ``--keep``
puts the part worth keeping under benchmarks/results, and ``--pages`` writes the figures into the
README and docs/, between markers that name what stands there.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .tables import write_json
from .timing import geometric_mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "drop-in.md"]
CHART = ROOT / "docs" / "images" / "ratios.png"
KINDS = ["inference, fp32", "training, fp32", "inference, bf16", "training, bf16"]

Result = dict[str, Any]


class UnreadableError(ValueError):
    """A file that is none of ours."""


def read(path: Path) -> Result:
    """One run's rows, and what they were measured on.

    Raises:
        UnreadableError: no JSON, or JSON of something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnreadableError(f"{path}: expected JSON: {str(error).splitlines()[0]}") from error
    if isinstance(found, dict):
        found = found.get("fastlstm", found)
        if {"date", "commit"} <= set(found) and any(_tables(found)):
            return {"file": path.name, **found}
    raise UnreadableError(f"{path}: expected what the suite or benchmarks.gpu_check wrote")


def _tables(result: Result) -> dict[str, list[dict[str, Any]]]:
    """Lists of rows by name: the suite's own, or those of every stage on a GPU."""
    parts = {"rows": result, **{k: v for k, v in result.items() if isinstance(v, dict)}}
    found = {name: part.get("rows") for name, part in parts.items()}
    return {name: rows for name, rows in found.items() if isinstance(rows, list) and rows}


def rows_of(result: Result, what: str) -> list[dict[str, Any]]:
    return [row for row in result.get("rows", []) if row.get("what") == what]


def row_of(result: Result, what: str, case: str) -> dict[str, Any]:
    return next(row for row in rows_of(result, what) if row["case"].startswith(case))


# ---- charts ----


def _figure(columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")


def ratios(result: Result) -> Any:
    """The faster peer's time over ours, for every case and kind."""
    kinds = [kind for kind in KINDS if rows_of(result, kind)]
    if not kinds:
        return None
    cases = list(dict.fromkeys(row["case"] for kind in kinds for row in rows_of(result, kind)))
    figure, ((axes,),) = _figure(size=(7, 0.4 * len(cases) + 1.2))
    values = [[_ratio(result, kind, case) for kind in kinds] for case in cases]
    shown = [[min(max(v if v is not None else 1.0, 0.5), 2.0) for v in line] for line in values]
    axes.imshow(shown, cmap="RdYlGn", vmin=0, vmax=2, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, "" if value is None else f"{value:.2f}", ha="center", va="center")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_title("time of the faster of nn.LSTM and ONNX Runtime over fastlstm's")
    return figure


def _ratio(result: Result, kind: str, case: str) -> float | None:
    return next((r.get("ratio") for r in rows_of(result, kind) if r["case"] == case), None)


def scaling(result: Result) -> Any:
    """Time over T, B, H and threads, and what growth in proportion from the first point is."""
    axes_of = [a for a in ("T", "B", "H", "threads") if rows_of(result, f"scaling in {a}")]
    if not axes_of:
        return None
    figure, (line,) = _figure(len(axes_of), (3.2 * len(axes_of), 3.2))
    for axes, name in zip(line, axes_of, strict=True):
        rows = rows_of(result, f"scaling in {name}")
        x = [row.get("x") or float(row["case"].split("=")[1]) for row in rows]
        y = [row["ours"] for row in rows]
        power = {"H": 2, "threads": -1}.get(name, 1)
        axes.loglog(x, [y[0] * (value / x[0]) ** power for value in x], "--", color="gray",
                    label="proportional")  # fmt: skip
        axes.loglog(x, y, "o-", label="fastlstm")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set_xlabel(name)
    line[0].set_ylabel("ms a training step")
    line[0].legend()
    return figure


def roofline(result: Result) -> Any:
    """What the products reach, under the ceilings that the same run measured."""
    ceilings = result.get("ceilings") or {}
    points = {kind: [r for r in rows_of(result, kind) if r.get("bytes")] for kind in KINDS}
    if not ceilings or not any(points.values()):
        return None
    figure, ((axes,),) = _figure()
    every = [row["flops"] / row["bytes"] for rows in points.values() for row in rows]
    edge = ceilings["multiply_adds"] / ceilings["copy"]
    x = sorted([min(every) / 2, edge, max(every) * 2])
    axes.loglog(x, [min(v * ceilings["copy"], ceilings["multiply_adds"]) / 1e9 for v in x],
                color="black", label="memory, multiply-adds")  # fmt: skip
    for kind, rows in points.items():
        axes.loglog([r["flops"] / r["bytes"] for r in rows],
                    [r["flops"] / r["ours"] / 1e6 for r in rows], "o", label=kind)  # fmt: skip
    axes.set_xlabel("FLOP for every byte of weights, input and output")
    axes.set_ylabel("GFLOP/s")
    axes.legend()
    return figure


CHARTS: dict[str, Callable[[Result], Any]] = {
    "ratios": ratios, "scaling": scaling, "roofline": roofline,
}  # fmt: skip


def png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


# ---- the page ----


def said(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
    return "" if x is None else str(x)


def html_table(rows: list[dict[str, Any]]) -> str:
    keys = [k for k in dict.fromkeys(k for row in rows for k in row)
            if not any(isinstance(row.get(k), (dict, list)) for row in rows)]  # fmt: skip
    cells = [[html.escape(said(row.get(key))) for key in keys] for row in rows]
    head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
    body = "".join(
        f"<tr{' class=missed' if row.get('met') == 'missed' else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in line)
        + "</tr>"
        for row, line in zip(rows, cells, strict=True)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


STYLE = """body{font:15px system-ui;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;font-size:13px}td,th{padding:2px 8px;text-align:right}
td:first-child,td:nth-child(2),th{text-align:left}tr:nth-child(even){background:#f4f4f4}
.missed td{color:#b00020}img{max-width:100%}"""


def page(results: Sequence[Result], out: Path) -> Path:
    """One HTML file with everything in it, and the charts beside it."""
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for result in results:
        facts = {k: v for k, v in result.items() if isinstance(v, (str, int, float, bool))}
        parts.append(f"<h2>{html.escape(result['file'])}</h2>{html_table([facts])}")
        for name, chart in CHARTS.items():
            figure = chart(result)
            if figure is None:
                continue
            data = png(figure)
            (out / f"{Path(result['file']).stem}-{name}.png").write_bytes(data)
            encoded = base64.b64encode(data).decode()
            parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{encoded}">')
        for name, rows in _tables(result).items():
            parts.append(f"<h3>{html.escape(name)}</h3>{html_table(rows)}")
    head = f"<!doctype html><meta charset=utf-8><title>fastlstm: measured</title><style>{STYLE}"
    note = "<p>Milliseconds; red: a target of the design that was missed.</p>"
    text = f"{head}</style><h1>What was measured</h1>{note}{''.join(parts)}"
    path = out / "index.html"
    path.write_text(text + "\n")
    return path


# ---- figures in the pages ----


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
    lines: list[list[Any]] = []
    for kind in KINDS:
        for case in ("Karpathy's batch", "small", "batch 1"):
            row = next((r for r in rows_of(result, kind) if r["case"] == case), None)
            if row:
                lines.append([f"{case}, {kind}", row["ours"], row["torch"], row.get("onnx")])
    named = {
        "a step a call": "2x512, batch 1", "a training step": "Karpathy's batch, fp32",
        "MB held for backward": "Karpathy's batch, fp32",
    }  # fmt: skip
    for what, case in named.items():
        row = row_of(result, what, case)
        lines.append([f"{what}: {case}", row["ours"], row["torch"], row.get("onnx")])
    means = []
    for kind in KINDS:
        rows = rows_of(result, kind)
        alone = geometric_mean(r["torch"] / r["ours"] for r in rows)
        text = f"{kind} {alone:.2f}"
        if any(r.get("onnx") for r in rows):
            text += f" ({geometric_mean(r['ratio'] for r in rows):.2f} of the faster of both)"
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
        + markdown(["problem", "fastlstm", "nn.LSTM", "ONNX Runtime"], lines)
        + f"\n\nnn.LSTM's time over ours, geometric means over the grid: {'; '.join(means)}. "
        f"Drawing text, 2x512: {rates}. "
        f"{missed} of {targets} targets of the design are missed"
        + (f", {unknown} not known." if unknown else ".")
    )


def packed_table(result: Result) -> str:
    rows = rows_of(result, "training, packed")
    cases = list(dict.fromkeys(re.split(", (?:padded|packed)", r["case"])[0] for r in rows))
    forms = ["padded", "packed, all of length T", "packed, lengths 1 to T"]
    lines = []
    for case in cases:
        own = [row_of(result, "training, packed", f"{case}, {form}") for form in forms]
        lines.append([case, *(r["ours"] for r in own), *(r["torch"] for r in own)])
    head = ["problem", *(f"fastlstm {f}" for f in forms), *(f"nn.LSTM {f}" for f in forms)]
    return f"{_source(result)}. Milliseconds a training step:\n\n" + markdown(head, lines)


def recomputation_table(result: Result) -> str:
    lines = []
    for row in rows_of(result, "recomputation"):
        found = re.fullmatch(r"(.*), (\S+): (\S+) MB", row["case"])
        assert found is not None
        lines.append([found[1], found[2], row["ours"], float(found[3])])
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "report")
    parser.add_argument(
        "--keep", action="store_true", help="keep the suite's rows under benchmarks/results"
    )
    parser.add_argument(
        "--pages", action="store_true", help="write the last file's figures into README and docs"
    )
    arguments = parser.parse_args(argv)
    try:
        results = [read(path) for path in arguments.files]
    except UnreadableError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if arguments.keep:
        for result in results:
            result["file"] = f"cpu-{result['date'][:10]}.json"
            kept = {key: value for key, value in result.items() if key != "file"}
            write_json(RESULTS / result["file"], kept)
    if arguments.pages:
        for path in PAGES:
            path.write_text(filled(path.read_text(), results[-1]["file"]))
        figure = ratios(results[-1])
        if figure is not None:
            CHART.write_bytes(png(figure))
    print(page(results, arguments.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
