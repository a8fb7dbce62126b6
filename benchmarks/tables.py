"""JSON files and tables of what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Every backend's name in the rows, and what people call it; tables have them in this order.
TITLES = {
    "fastlstm": "fastlstm", "prepacked": "fastlstm, prepacked", "torch": "nn.LSTM",
    "compiled": "compiled nn.LSTM", "onnxruntime": "ONNX Runtime",
    "flashrnn": "FlashRNN", "haste": "haste",
}  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write beside the file and rename, so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: text to the left, numbers (three digits) to the right."""

    def cell(x: object) -> str:
        if isinstance(x, float):
            return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"
        return "" if x is None else str(x)

    lines = [[cell(x) for x in row] for row in [head, *rows]]
    widths = [max(len(line[j]) for line in lines) for j in range(len(head))]
    right = [any(isinstance(row[j], (int, float)) for row in rows) for j in range(len(head))]
    return "\n".join(
        "  ".join(
            x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )
