"""The order of gpu_check's stages, and the text that ends it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .accuracy import PRECISIONS
from .gpu_checks import WORSE_THAN_TORCH, determinism, graphs, parity, sanitizer, streams
from .gpu_times import benchmark, ceilings
from .tables import table


def stages(device: str, quick: bool) -> list[Callable[[float], dict[str, Any]]]:
    algorithms = ["stepwise", "persistent"] if device == "cuda" else ["auto"]
    precisions = list(PRECISIONS) if device == "cuda" else ["fp32", "bf16"]
    both: dict[str, Any] = {"device": device, "algorithms": algorithms}
    found: list[Any] = [
        functools.partial(parity, **both, precisions=precisions, seeds=2 if quick else 5),
        functools.partial(determinism, **both, repeats=3 if quick else 10),
        functools.partial(streams, **both, repeats=3 if quick else 20),
        functools.partial(graphs, **both),
        functools.partial(sanitizer, tools=["memcheck"] if quick else ["memcheck", "racecheck"]),
        functools.partial(ceilings, device=device),
        functools.partial(benchmark, **both, precisions=precisions, rounds=3 if quick else 7),
    ]
    for stage in found:
        stage.__name__ = stage.func.__name__
    return found


def summary(report: dict[str, Any]) -> str:
    """What a reader wants last: times, means, what failed and what was left out."""
    rows = [
        [
            row["case"], row["precision"], "train" if row["training"] else "infer",
            row["algorithm"] + ("" if row["algorithm"] == row["backward_algorithm"] or
                                not row["training"] else f"/{row['backward_algorithm']}"),
            row["milliseconds"]["torch"], row["milliseconds"]["fastlstm"], row["ratio"],
            row["step_microseconds"], row["estimated_step_microseconds"],
            row["target_milliseconds"],
        ]
        for row in report.get("benchmark", {}).get("rows", [])
    ]  # fmt: skip
    head = ["case", "type", "pass", "algorithm", "torch ms", "ours ms", "ratio", "us/step"]
    lines = [table([*head, "estimate", "target ms"], rows)] if rows else []
    means = report.get("benchmark", {}).get("geometric_means", {})
    lines += [f"geometric mean, {name}: {x:.2f}" for name, x in means.items()]
    parity_rows = report.get("parity", {}).get("rows", [])
    ran = [row for row in parity_rows if "relative" in row]
    behind = len(report.get("parity", {}).get("behind_torch", []))
    lines.append(
        f"parity: {len(ran)} ran, {len(parity_rows) - len(ran)} refused, "
        f"{behind} more than {WORSE_THAN_TORCH} times as far from float64 as torch"
    )
    for kind in ("skipped", "failed"):
        entries = report[kind]
        lines.append(f"{kind}: {len(entries)}")
        lines += [f"  {text}" for text in entries[:20]]
    return "\n".join(lines)
