"""gpu_check's times: the machine's ceilings, and the grid against ``nn.LSTM``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastlstm

from .accuracy import precision
from .gpu_checks import refusal
from .grid import GPU_CASES, Case
from .timing import events, geometric_mean, interleaved, wall

# Milliseconds of forward and backward in bf16 that the design asks for on an H200.
TARGETS = {
    "Karpathy's batch": 0.8,
    "Karpathy's batch, dropout": 0.8,
    "long, H1024": 4.8,
    "long, H256": 3.0,
}


def ceilings(end: float, device: str) -> dict[str, Any]:
    """What this machine does at best: a large product, and a copy of what no cache holds."""
    cuda = device == "cuda"
    n, count = (8192, 1 << 30) if cuda else (512, 1 << 20)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.empty(count, device=device, dtype=torch.uint8).fill_(7) for _ in range(2))
    clock = events if cuda else wall
    found = interleaved({"product": lambda: a @ b, "copy": lambda: y.copy_(x)}, 5, clock)
    return {
        "bf16_tflops": 2 * n**3 / found["product"].median / 1e12,
        "copy_gigabytes_per_second": 2 * count / found["copy"].median / 1e9,
    }


def benchmark(
    end: float, device: str, algorithms: Sequence[str], precisions: Sequence[str], rounds: int,
    cases: Sequence[Case] = GPU_CASES,
) -> dict[str, Any]:  # fmt: skip
    """Training (forward and backward) and inference against nn.LSTM, interleaved."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for kind in precisions:
        for case in cases:
            exact = kind in ("fp32", "fp64")
            if exact and (case.hidden_size < 256 or case.batch < 16 or case.hidden_size > 1024):
                continue  # the design asks nothing there, and they take long
            for training in (True, False):
                if time.monotonic() > end:
                    skipped.append(f"{case.name}, {kind}, {'train' if training else 'infer'}")
                    continue
                rows.append(_time_case(case, kind, training, device, algorithms, rounds))
    ratios: dict[str, list[float]] = {}
    for row in rows:
        name = f"{row['precision']} {'train' if row['training'] else 'infer'}"
        ratios.setdefault(name, []).append(row["ratio"])
    means = {name: geometric_mean(values) for name, values in ratios.items()}
    return {"rows": rows, "geometric_means": means, "skipped": skipped}


def _time_case(
    case: Case, kind: str, training: bool, device: str, algorithms: Sequence[str], rounds: int
) -> dict[str, Any]:
    with precision(kind) as (dtype, _):
        theirs, ours = case.twins(dtype, device)
        x, gradient = case.data(dtype, device)

        def call(module: torch.nn.Module, algorithm: str) -> Callable[[], object]:
            def train() -> None:
                module.zero_grad(set_to_none=True)
                with fastlstm.algorithm(algorithm):
                    module(x)[0].backward(gradient)

            def infer() -> None:
                with torch.no_grad(), fastlstm.algorithm(algorithm):
                    module(x)

            module.train(training)
            return train if training else infer

        candidates = {"torch": call(theirs, "auto"), "fastlstm": call(ours, "auto")}
        for algorithm in algorithms:
            if algorithm == "auto":
                continue
            forced = call(ours, algorithm)
            try:
                forced()
            except RuntimeError as error:
                if refusal(error) is None:
                    raise
                continue
            candidates[algorithm] = forced
        found = interleaved(candidates, rounds, events if device == "cuda" else wall)
        explained = fastlstm.explain(ours, case.batch, case.steps)
        peak = {name: _peak_memory(candidates[name], device) for name in ("torch", "fastlstm")}
    step = explained.step_microseconds
    if training and step is not None:
        step += explained.backward_step_microseconds or 0.0
    return {
        "case": case.name,
        "precision": kind,
        "training": training,
        "algorithm": explained.algorithm,
        "backward_algorithm": explained.backward_algorithm,
        "milliseconds": {name: 1e3 * s.median for name, s in found.items()},
        "spread": {name: s.spread for name, s in found.items()},
        "ratio": found["torch"].median / found["fastlstm"].median,
        "step_microseconds": 1e6 * found["fastlstm"].median / case.steps,
        "estimated_step_microseconds": step,
        "teraflops": case.flops(training) / found["fastlstm"].median / 1e12,
        "peak_bytes": peak,
        "target_milliseconds": TARGETS.get(case.name) if training and kind == "bf16" else None,
    }


def _peak_memory(call: Callable[[], object], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
