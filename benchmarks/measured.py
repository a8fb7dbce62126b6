"""What measurements left: the suite's rows, or those of every stage of ``benchmarks.gpu_check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ["inference, fp32", "training, fp32", "inference, bf16", "training, bf16"]
GPU_KINDS = ["inference, fp16", "training, fp16", "inference, tf32", "training, tf32"]
# What rows called two backends until 2026-11-24.
FORMER = {"ours": "fastlstm", "onnx": "onnxruntime"}

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
        if {"date", "commit"} <= set(found) and any(tables(found)):
            if "rows" in found:
                found["rows"] = [
                    {FORMER.get(key, key): x for key, x in row.items()} for row in found["rows"]
                ]
            return {"file": path.name, **found}
    raise UnreadableError(f"{path}: expected what the suite or benchmarks.gpu_check wrote")


def tables(result: Result) -> dict[str, list[dict[str, Any]]]:
    """Lists of rows by name: the suite's own, or those of every stage on a GPU."""
    parts = {"rows": result, **{k: v for k, v in result.items() if isinstance(v, dict)}}
    found = {name: part.get("rows") for name, part in parts.items()}
    return {name: rows for name, rows in found.items() if isinstance(rows, list) and rows}


def of_gpu(result: Result) -> bool:
    """Whether gpu_check wrote it: the suite's rows are not those of a stage."""
    return "rows" not in result


def rows_of(result: Result, what: str) -> list[dict[str, Any]]:
    return [row for row in result.get("rows", []) if row.get("what") == what]


def row_of(result: Result, what: str, case: str) -> dict[str, Any]:
    return next(row for row in rows_of(result, what) if row["case"].startswith(case))


def said(x: Any) -> str:
    """A figure as a page shows it."""
    if isinstance(x, float):
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
    return "" if x is None else str(x)
