"""The README's and the documents' figures: tables in Markdown, made from a run's rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..cases import CPU_CASES
from ..measured import KINDS, RESULTS, ROOT, Result, of_gpu, read, row_of, rows_of, said
from ..tables import TITLES
from ..timing import geometric_mean
from . import expected

SHOWN = ["Karpathy's batch", "small", "batch 1"]
PAGES = [ROOT / "README.md", ROOT / "docs" / "drop-in.md", ROOT / "docs" / "kernels.md"]


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(said(x) for x in line) + " |" for line in lines)


def _source(result: Result) -> str:
    if of_gpu(result):
        return (
            f"{result['gpu']}, driver {result['driver']}, torch {result['torch']}, "
            f"cuDNN {result['cudnn']}, {result['date'][:10]}, commit {result['commit'][:7]}"
        )
    return (
        f"{result['processor']}, {result['threads']} threads, torch {result['torch']}, "
        f"{result['date']}, commit {result['commit'][:7]}"
    )


def cpu_table(result: Result) -> str:
    """The README's: some cases, and the means over all."""
    sizes = {case.name: f"{case.name} ({case.sizes()})" for case in CPU_CASES}
    named = {
        **{f"{sizes[case]}, {kind}": (kind, case) for kind in KINDS for case in SHOWN},
        "a step a call: 2x512, batch 1": ("a step a call", "2x512, batch 1"),
        **{
            f"{what}: {sizes[SHOWN[0]]}, fp32": (what, f"{SHOWN[0]}, fp32")
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
            text += f" ({geometric_mean(r['ratio'] for r in grid):.2f} of the faster of both"
            packed = [r["prepacked_ratio"] for r in grid if "prepacked_ratio" in r]
            text += f", {geometric_mean(packed):.2f} with packed weights)" if packed else ")"
        means.append(text)
    rates = ", ".join(
        f"{re.sub('2x512, ', '', row['case']).replace(': ', ' ')}"
        for row in rows_of(result, "generate")
    )
    return (
        f"{_source(result)}. Milliseconds:\n\n"
        + markdown(["problem", *(TITLES[name] for name in names)], lines)
        + f"\n\nnn.LSTM's time over ours, geometric means over the grid: {'; '.join(means)}. "
        f"Drawing text, 2x512: {rates}."
    )


def _first(result: Result, what: str, case: str) -> dict[str, Any]:
    """The row of that case, or else the first whose case begins so."""
    rows = rows_of(result, what)
    exact = [row for row in rows if row["case"] == case]
    return next(iter(exact or [row for row in rows if row["case"].startswith(case)]), {})


def headline_table(result: Result) -> str:
    """The README's first: where it gains most, and where ONNX Runtime leads."""
    rows = {}
    for what, where, unit in (
        ("training on packed sequences of 1 to T steps, CPU | H128, B16",
         ("training, packed", "H128, batch 16, packed, lengths 1 to T"), "ms"),
        ("training in bf16, CPU | 1024-1024, B64 T50", ("training, bf16", "H1024"), "ms"),
        ("memory held for backward, fp32 | 65-512x2, B100 T100",
         ("MB held for backward", f"{SHOWN[0]}, fp32"), "MB"),
    ):  # fmt: skip
        if row := _first(result, *where):
            rows[what] = [f"{said(row[name])} {unit}" for name in ("fastlstm", "torch")]
    lines = [[*what.split(" | "), *both] for what, both in rows.items()]
    if step := _first(result, "a step a call", "2x512, batch 1"):
        peer = f"{said(step['torch'])} ms (ONNX Runtime {said(step.get('onnxruntime'))})"
        what = "a step a call, weights packed once, fp32, CPU"
        lines.insert(0, [what, "2x512, batch 1", f"{said(step.get('prepacked'))} ms", peer])
    if drawn := drawing(result):
        rates = [f"{rate:,.0f} characters/s" for rate in drawn]
        lines.insert(0, ["drawing text in bf16, CPU", "2x512, batch 1", *rates])
    inference = rows_of(result, "inference, fp32")
    packed = [r["prepacked_ratio"] for r in inference if "prepacked_ratio" in r]
    behind = sum(r["ratio"] < 1 for r in inference)
    return markdown(["what", "shape", "fastlstm", "nn.LSTM"], lines) + (
        "\n\nIn fp32 inference on a CPU, with weights packed once, fastlstm is "
        f"{min(packed):.2f} to {max(packed):.2f} times as fast as the faster of `nn.LSTM` and ONNX "
        f"Runtime; without packing, ONNX Runtime leads on {behind} of {len(inference)} shapes."
        if packed
        else ""
    )


def drawing(result: Result) -> tuple[float, float] | None:
    """Characters a second of a 2x512 model in bf16, by ours and by a loop over nn.LSTM."""
    row = _first(result, "generate", "2x512, bf16")
    rate = re.search(r"(\d+) characters/s", row.get("case", ""))
    return (float(rate[1]), float(rate[1]) / row["ratio"]) if rate else None


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


def gpu_table(result: Result) -> str:
    """Each problem at the best of both sides, and the ranges of all ratios."""
    rows = [row for row in result["times"]["rows"] if "refused" not in row]
    timed = {(r["case"], r["precision"], r["training"]): r for r in rows}
    lines: dict[str, list[Any]] = {r["case"]: [f"{r['case']} ({r['sizes']})"] for r in rows}
    best, eager = [], []
    for training, what in ((False, "inference"), (True, "training")):
        ratios = []
        for case, line in lines.items():
            half = [timed[case, kind, training] for kind in HALF]
            theirs = min(r[name] for r in half for name in ("torch", "torch_graph"))
            ours = min(r["fastlstm_graph"] for r in half)
            line += [theirs, ours, theirs / ours]
            ratios.append(theirs / ours)
        best.append(f"{what} {_range(ratios)}")
        eager.append(f"{what} {_range([timed[case, 'bf16', training]['ratio'] for case in lines])}")
    exact = [row["graph_ratio"] for row in rows if row["precision"] == "fp32"]
    names = ("nn.LSTM", "fastlstm", "ratio")
    head = ["problem", *(f"{what}: {x}" for what in ("inference", "training") for x in names)]
    return (
        f"{_source(result)}. Milliseconds in half types, each side at its best: nn.LSTM's shorter "
        "of bf16 and fp16, called eagerly or replayed as a CUDA graph; fastlstm's shorter of both "
        "as a graph:\n\n"
        + markdown(head, list(lines.values()))
        + f"\n\nnn.LSTM's time over fastlstm's: at their best {', '.join(best)}; called eagerly in "
        f"bf16 {', '.join(eager)}; in fp32 without tf32, both as graphs, {_range(exact)}."
    )


def _range(ratios: Sequence[float]) -> str:
    below = sum(ratio < 1 for ratio in ratios)
    return f"{min(ratios):.2f} to {max(ratios):.2f} (below 1 in {below} of {len(ratios)})"


def gpu_steps(result: Result) -> str:
    """docs/kernels.md's: what the planner estimated of a step, and what it took."""
    timed = {(r["case"], r["training"]): r for r in result["times"]["rows"]
             if r["precision"] == "bf16" and "refused" not in r}  # fmt: skip
    lines = []
    for case in dict.fromkeys(case for case, _ in timed):
        forward, both = timed[case, False], timed[case, True]
        algorithms = "/".join(dict.fromkeys([both["algorithm"], both["backward_algorithm"]]))
        line = [f"{case} ({both['sizes']})", algorithms]
        for row in (forward, both):
            line += [row["estimated_step_microseconds"], row["step_microseconds"]]
        lines.append(line)
    head = [
        "problem",
        "algorithm",
        "forward: estimate",
        "measured",
        "both passes: estimate",
        "measured",
    ]
    return (
        f"{_source(result)}. Microseconds a step of all layers, bf16; measured: a whole call as a "
        "CUDA graph, with the products around the steps:\n\n" + markdown(head, lines)
    )


def gpu_expected(result: Result) -> str:
    """docs/kernels.md's: whole calls as they are estimated, beside nn.LSTM as it was measured."""
    found = expected.rows(result)
    lines: dict[str, list[Any]] = {}
    for row in found:
        if row.kind == "bf16":
            line = lines.setdefault(row.case.name, [f"{row.case.name} ({row.case.sizes()})"])
            line += [row.theirs, row.ours, row.ratio]
    head = ["problem", "inference: nn.LSTM", "fastlstm, estimated", "ratio",
            "training: nn.LSTM", "fastlstm, estimated", "ratio"]  # fmt: skip
    return (
        f"{_source(result)}. Milliseconds in half types; nn.LSTM measured, the shortest of bf16 "
        "and fp16, called eagerly or replayed as a CUDA graph; fastlstm as a graph, an estimate of "
        "the planner and of `benchmarks/report/expected.py`, not measured:\n\n"
        + markdown(head, list(lines.values()))
        + "\n\nnn.LSTM's measured time over fastlstm's estimate, geometric means in inference and "
        f"training: {_means(expected.means(found))}; called eagerly, against that estimate of the "
        f"same type, {_means(expected.eager_means(found))}."
    )


def _means(means: expected.Means) -> str:
    return "; ".join(
        f"{kind} {' and '.join(f'{mean:.2f} (least {least:.2f})' for mean, least in both)}"
        for kind, both in means.items()
    )


HALF = ("bf16", "fp16")
FIGURES: dict[str, Callable[[Result], str]] = {
    "headline": headline_table, "cpu": cpu_table, "packed": packed_table,
    "recomputation": recomputation_table,
    "gpu": gpu_table, "steps": gpu_steps, "expected": gpu_expected,
}  # fmt: skip
OF_GPUS = ("gpu", "steps", "expected")
MARKED = re.compile(r"<!-- measured: (\w+), (\S+) -->\n.*?<!-- end -->", re.S)


def filled(text: str, file: str | None = None) -> str:
    """A page with the figures that its markers name, from the files that they name.

    ``file`` takes the place of those of its kind, CPU's or GPU's.
    """
    kind = file is not None and of_gpu(read(RESULTS / file))

    def figures(found: re.Match[str]) -> str:
        name, source = found[1], found[2]
        if file and kind == (name in OF_GPUS):
            source = file
        body = FIGURES[name](read(RESULTS / source))
        return f"<!-- measured: {name}, {source} -->\n{body}\n<!-- end -->"

    return MARKED.sub(figures, text)
