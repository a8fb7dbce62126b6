"""How the CPU kernels would divide the cases among 1 to 64 threads: estimates, never measured.

The choices and their costs are those of the kernels (``csrc/cpu/cost_model.h``); a file's rate of
multiply-adds turns costs into milliseconds. They count the products, the reading of weights, the
cells and the barriers; neither packing, nor what a call costs, nor the start of threads. Beside
them stands an ideal of nn.LSTM: one direction after the other, every product perfectly divided, and
one barrier a step, among as many threads as pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlstm import _C

from ..cases import CPU_CASES, Case
from ..measured import Result, rows_of
from ..tables import table

THREADS = (1, 2, 4, 8, 16, 32, 64)
NOTE = (
    "Estimated by the kernels' cost model, not measured: parts of the batch x threads in a team, "
    "speedup over one thread (in brackets that of an ideal nn.LSTM)."
)


def layers(case: Case, costs: str, weight_bytes: int, threads: int) -> list[dict[str, Any]]:
    """What the kernels do with each layer in inference, as ``_C.cpu_division`` tells it."""
    directions = 1 + case.bidirectional
    sizes: dict[str, Any] = {
        "costs": costs, "weight_bytes": weight_bytes, "hidden_size": case.hidden_size,
        "steps": case.steps, "batch": case.batch, "directions": directions, "threads": threads,
    }  # fmt: skip
    widths = [case.input_size, *[directions * case.hidden_size] * (case.num_layers - 1)]
    return [_C.cpu_division(input_size=width, **sizes) for width in widths]


def _kinds(result: Result) -> dict[str, tuple[str, int, float]]:
    """Of every kind: the costs that hold, the bytes of a weight, a thread's multiply-adds a second.

    Empty where the file does not say what a thread's rate is.
    """
    ceilings = result.get("ceilings") or {}
    if "multiply_adds" not in ceilings:
        return {}
    instructions = result["processor"].rsplit(", ", 1)[-1]
    of_floats = "narrow" if instructions in ("avx2", "baseline") else "avx512"
    kinds = {"inference, fp32": (of_floats, 4, ceilings["multiply_adds"])}
    if "multiply_adds_bf16" in ceilings:
        costs = "tiles" if instructions == "amx" else of_floats
        kinds["inference, bf16"] = (costs, 2, ceilings["multiply_adds_bf16"])
    return {kind: (*rest, rate / 2 / result["threads"]) for kind, (*rest, rate) in kinds.items()}


def estimates(result: Result, cases: Sequence[Case] = CPU_CASES) -> list[dict[str, Any]]:
    """A row for every kind, case and number of threads; none for a GPU's file."""
    rows = []
    for kind, (costs, weight_bytes, rate) in _kinds(result).items():
        measured = {
            (row["case"], result["threads"]): row.get("fastlstm") for row in rows_of(result, kind)
        }
        for case in cases:
            alone: tuple[float, float] | None = None
            for threads in THREADS:
                chosen = layers(case, costs, weight_bytes, threads)
                ours, even = (
                    sum(layer[name] for layer in chosen) / rate * 1e3
                    for name in ("multiply_adds", "even_multiply_adds")
                )
                alone = alone or (ours, even)
                divisions = dict.fromkeys(f"{c['parts']} x {c['members']}" for c in chosen)
                rows.append({
                    "what": kind, "case": case.name, "threads": threads,
                    "parts x team": ", ".join(divisions),
                    "estimated ms": ours, "estimated speedup": alone[0] / ours,
                    "ideal nn.LSTM, estimated ms": even, "its speedup": alone[1] / even,
                    "measured ms": measured.get((case.name, threads)),
                })  # fmt: skip
    return rows


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of each kind as one table, a case a line."""
    parts = []
    for kind in dict.fromkeys(row["what"] for row in rows):
        lines: dict[str, list[Any]] = {}
        for row in rows:
            if row["what"] != kind:
                continue
            line = lines.setdefault(row["case"], [row["case"], row["estimated ms"]])
            if row["threads"] > 1:
                speedups = f"{row['estimated speedup']:.1f} ({row['its speedup']:.1f})"
                line.append(f"{row['parts x team']}: {speedups}")
        head = [kind, "ms on 1", *(f"{n} threads" for n in THREADS[1:])]
        parts.append(table(head, list(lines.values())))
    return "\n\n".join([NOTE, *parts])
