"""Tables and charts of what was measured: ``python -m benchmarks.report JSON ...``.

Reads what the suite (pytest-benchmark's JSON, or the part of it that is kept) and
``benchmarks.gpu_check`` write. Makes one self-contained page and a PNG of every chart; ``--keep``
puts the part worth keeping under benchmarks/results, and ``--pages`` writes the figures into the
README and docs/, between markers that name what stands there. Printed, and on the page too: how the
CPU kernels would divide the cases among up to 64 threads, which is an estimate.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import measured
from ..measured import ROOT, Result, UnreadableError, of_gpu, read, said, tables
from ..tables import write_json
from . import cores
from .charts import CHARTS, png
from .figures import PAGES, filled

IMAGES = ROOT / "docs" / "images"
SHOWN = ["ratios", "roofline"]  # in the README


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
        for name in ("failed", "skipped"):
            if texts := result.get(name):
                items = "".join(f"<li>{html.escape(text)}" for text in texts)
                parts.append(f"<h3>{name}</h3><ul>{items}</ul>")
        if ceilings := result.get("ceilings"):
            parts.append(f"<h3>ceilings</h3>{html_table([ceilings])}")
        for name, rows in tables(result).items():
            parts.append(f"<h3>{html.escape(name)}</h3>{html_table(rows)}")
        if rows := cores.estimates(result):
            parts.append(f"<h3>estimated for more threads</h3><p>{cores.NOTE}</p>")
            parts.append(html_table(rows))
    head = f"<!doctype html><meta charset=utf-8><title>fastlstm: measured</title><style>{STYLE}"
    note = "<p>Milliseconds; red: a target of the design that was missed.</p>"
    text = f"{head}</style><h1>What was measured</h1>{note}{''.join(parts)}"
    path = out / "index.html"
    path.write_text(text + "\n")
    return path


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
        "--pages",
        action="store_true",
        help="write the last file's figures, CPU's or GPU's, into README and docs",
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
            write_json(measured.RESULTS / result["file"], kept)
    if arguments.pages:
        for path in PAGES:
            path.write_text(filled(path.read_text(), results[-1]["file"]))
        for name in SHOWN:
            figure = CHARTS[name](results[-1])
            if figure is not None:
                prefix = "gpu-" if of_gpu(results[-1]) else ""
                (IMAGES / f"{prefix}{name}.png").write_bytes(png(figure))
    for result in results:
        if rows := cores.estimates(result):
            print(f"{result['file']}. {cores.text(rows)}\n")
    print(page(results, arguments.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
