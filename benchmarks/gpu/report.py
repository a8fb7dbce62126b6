"""What gpu_check writes: a JSON, and beside it the text that it prints last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tables import table, write_json, write_text
from ..timing import geometric_mean
from .processes import Part
from .times import PASSES

# Our distance from the float64 reference over torch's own: more is reported.
WORSE_THAN_TORCH = 1.5
LISTED = 20  # failures, and skipped tasks, in the text
KERNELS, NAME = 3, 70  # of a profile in the text, and characters of their names
HALF, EXACT = ("bf16", "fp16"), ("tf32", "fp32")
# Geometric means that are asked for on an H200: half types against nn.LSTM at its best, and against
# its eager calls; the others as graphs.
_MEANS = [(HALF, "best_ratio", 2.5), (HALF, "eager_ratio", 5.0), (EXACT, "graph_ratio", 1.5)]
MEANS = {
    f"{kind} {passes}, {ratio}": target
    for kinds, ratio, target in _MEANS
    for kind in kinds
    for passes in PASSES.values()
}


class Report:
    """What the stages answered so far; written anew with every answer."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {**header, "failed": [], "skipped": []}

    def take(self, stage: str, part: Part) -> None:
        """Add a stage's part: its rows, texts of what failed and was skipped, and what else."""
        own = self.data.setdefault(stage, {"seconds": 0.0})
        for kind in ("failed", "skipped"):
            self.data[kind] += [f"{stage}: {text}" for text in part.pop(kind, [])]
        own["seconds"] = round(own["seconds"] + part.pop("seconds", 0.0), 2)  # of all processes
        if rows := part.pop("rows", []):
            own.setdefault("rows", []).extend(rows)
        own.update(part)
        if stage == "times":
            compare(own.get("rows", []))
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)
        write_text(self.path.with_suffix(".txt"), summary(self.data) + "\n")


def compare(rows: list[dict[str, Any]]) -> None:
    """Half types: nn.LSTM's best time, of both types, eager or as a graph, over ours as a graph."""
    best: dict[tuple[str, bool], float] = {}
    for row in rows:
        if row["precision"] in HALF:
            times = [row[name] for name in ("torch", "torch_graph") if name in row]
            where = row["case"], row["training"]
            best[where] = min([*times, best.get(where, float("inf"))])
    for row in rows:
        if row["precision"] in HALF and "fastlstm_graph" in row:
            row["best_ratio"] = best[row["case"], row["training"]] / row["fastlstm_graph"]


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric means of each ratio by type and pass."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for name in ("ratio", "graph_ratio", "best_ratio", "eager_ratio"):
            if row.get(name):
                what = f"{row['precision']} {PASSES[row['training']]}, {name}"
                ratios.setdefault(what, []).append(row[name])
    return {name: geometric_mean(values) for name, values in ratios.items()}


def summary(data: dict[str, Any]) -> str:
    """What a reader wants last: times, means, what failed and what was left out."""
    rows = data.get("times", {}).get("rows", [])
    lines = _times(rows) + [
        f"geometric mean, {name}: {x:.2f}" + (f", target {MEANS[name]}" if name in MEANS else "")
        for name, x in means(rows).items()
    ]
    lines += _steps(data.get("steps", {}).get("rows", []))
    for row in data.get("profile", {}).get("rows", []):
        lines.append(
            f"{row['case']}, {row['precision']}, a training call of {row['backend']}: "
            f"{row['launches']:.0f} kernels, {row['milliseconds']:.2f} ms of their time"
        )
        lines += [
            f"  {kernel['microseconds']:8.1f} us in {kernel['calls']:.0f}: {kernel['name'][:NAME]}"
            for kernel in row["kernels"][:KERNELS]
        ]
    for row in data.get("text", {}).get("rows", []):
        lines.append(
            f"text, 2 layers, {row['weights']}, batch {row['batch']}: "
            f"{row['characters_per_second']:,.0f} characters/s, a loop over nn.LSTM "
            f"{row['loop_characters_per_second']:,.0f}"
            + (f", target {row['target']:,.0f}" if row["target"] else "")
        )
    for row in data.get("dropin", {}).get("rows", []):
        lines.append(
            f"{row['file']}: {row['ran']} ran, {row['failed']} failed, {row['skipped']} skipped"
        )
    if parity := data.get("parity", {}).get("rows", []):
        ran = [row for row in parity if "relative" in row]
        behind = [
            row for row in ran
            if row["relative"] > WORSE_THAN_TORCH * row.get("torch_relative", float("inf"))
        ]  # fmt: skip
        lines.append(
            f"parity: {len(ran)} ran, {len(parity) - len(ran)} refused, "
            f"{len(behind)} more than {WORSE_THAN_TORCH} times as far from float64 as torch"
        )
    for kind in ("skipped", "failed"):
        lines.append(f"{kind}: {len(data[kind])}")
        lines += [f"  {text}" for text in data[kind][:LISTED]]
    return "\n".join(lines)


def _times(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "case", "type", "pass", "algorithm", "nn.LSTM ms", "graph", "ours ms", "graph", "ratio",
        "of graphs", "of best", "us/step", "estimate", "target ms", "",
    ]  # fmt: skip
    keys = [
        "torch", "torch_graph", "fastlstm", "fastlstm_graph", "ratio", "graph_ratio", "best_ratio",
        "step_microseconds", "estimated_step_microseconds", "target_milliseconds",
    ]  # fmt: skip
    lines = [
        [
            row["case"], row["precision"], PASSES[row["training"]], _algorithms(row),
            *(row.get(key) for key in keys),
            "not flattened" if row.get("flattened") is False else "",
        ]
        for row in rows
        if "refused" not in row
    ]  # fmt: skip
    return [table(head, lines)] if lines else []


def _steps(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "layer", "type", "algorithm", "forward, us a step", "estimate", "target", "backward",
        "estimate", "target",
    ]  # fmt: skip
    keys = [f"{which}{what}" for which in ("forward", "backward")
            for what in ("", "_estimate", "_target")]  # fmt: skip
    lines = [
        [f"H{row['hidden_size']} B{row['batch']}", row["precision"], row["algorithm"],
         *(row.get(key) for key in keys)]
        for row in rows
        if "refused" not in row
    ]  # fmt: skip
    return [table(head, lines)] if lines else []


def _algorithms(row: dict[str, Any]) -> str:
    both = dict.fromkeys([row["algorithm"], row["backward_algorithm"]])
    return "/".join(both) if row["training"] else row["algorithm"]
