"""The GPU's times: its ceilings, and the grid against ``nn.LSTM``; for gpu_check and test_gpu."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastlstm

from .accuracy import precision
from .backends import Prepared, prepared
from .gpu_checks import refusal
from .grid import GPU_CASES, Case
from .machine import peak_memory
from .timing import Samples, events, geometric_mean, interleaved, wall

# Milliseconds of forward and backward in bf16 that the design asks for on an H200.
TARGETS = {
    "Karpathy's batch": 0.8,
    "Karpathy's batch, dropout": 0.8,
    "long, H1024": 4.8,
    "long, H256": 3.0,
}


def ceilings(
    end: float, device: str, precisions: Sequence[str] = ("bf16", "fp16", "tf32", "fp32")
) -> dict[str, Any]:
    """What this machine does at best: large products, and a copy of what no cache holds."""
    cuda = device == "cuda"
    n, count = (8192, 1 << 30) if cuda else (512, 1 << 20)
    clock = events if cuda else wall
    found: dict[str, Any] = {}
    for kind in precisions:
        with precision(kind) as (dtype, _):
            a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            product = interleaved({kind: lambda a=a, b=b: a @ b}, 5, clock)[kind]  # type: ignore[misc]
        found[f"{kind}_tflops"] = 2 * n**3 / product.median / 1e12
    x, y = (torch.empty(count, device=device, dtype=torch.uint8).fill_(7) for _ in range(2))
    copy = interleaved({"copy": lambda: y.copy_(x)}, 5, clock)["copy"]
    return found | {"copy_gigabytes_per_second": 2 * count / copy.median / 1e9}


def asked(case: Case, kind: str) -> bool:
    """Whether the design asks anything there: in exact types, small ones mean nothing, and take
    long."""
    exact = kind in ("fp32", "fp64")
    return not exact or (256 <= case.hidden_size <= 1024 and case.batch >= 16)


def benchmark(
    end: float, device: str, algorithms: Sequence[str], precisions: Sequence[str], rounds: int,
    cases: Sequence[Case] = GPU_CASES,
) -> dict[str, Any]:  # fmt: skip
    """Training (forward and backward) and inference against nn.LSTM, interleaved."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for kind in precisions:
        for case in cases:
            if not asked(case, kind):
                continue
            for training in (True, False):
                if time.monotonic() > end:
                    skipped.append(f"{case.name}, {kind}, {'train' if training else 'infer'}")
                    continue
                found = timed(case, kind, training, device, algorithms, rounds)
                rows.append(found.row())
    ratios: dict[str, list[float]] = {}
    for row in rows:
        name = f"{row['precision']} {'train' if row['training'] else 'infer'}"
        ratios.setdefault(name, []).append(row["ratio"])
    means = {name: geometric_mean(values) for name, values in ratios.items()}
    return {"rows": rows, "geometric_means": means, "skipped": skipped}


@dataclass
class Timed:
    """One problem's candidates: backends by name, and our algorithms that were forced."""

    case: Case
    kind: str
    training: bool
    samples: dict[str, Samples]
    peak_bytes: dict[str, int | None]
    ready: Prepared
    explained: Any

    def row(self) -> dict[str, Any]:
        """What gpu_check reports."""
        ours, explained = self.samples["fastlstm"], self.explained
        step = explained.step_microseconds
        if self.training and step is not None:
            step += explained.backward_step_microseconds or 0.0
        target = TARGETS.get(self.case.name) if self.training and self.kind == "bf16" else None
        return {
            "case": self.case.name,
            "precision": self.kind,
            "training": self.training,
            "algorithm": explained.algorithm,
            "backward_algorithm": explained.backward_algorithm,
            "milliseconds": {name: 1e3 * s.median for name, s in self.samples.items()},
            "spread": {name: s.spread for name, s in self.samples.items()},
            "ratio": self.samples["torch"].median / ours.median,
            "step_microseconds": 1e6 * ours.median / self.case.steps,
            "estimated_step_microseconds": step,
            "teraflops": self.case.flops(self.training) / ours.median / 1e12,
            "peak_bytes": {name: self.peak_bytes[name] for name in ("torch", "fastlstm")},
            "target_milliseconds": target,
        }


def timed(
    case: Case, kind: str, training: bool, device: str, algorithms: Sequence[str], rounds: int,
    backends: Sequence[str] = ("torch", "fastlstm"),
) -> Timed:  # fmt: skip
    """Time backends, and ours with each algorithm that can run the problem, in turn."""
    with precision(kind):
        ready = prepared(case, kind, training, device, backends)
        candidates = dict(ready.calls)
        for algorithm in algorithms:
            if algorithm == "auto":
                continue
            call = _forced(ready.calls["fastlstm"], algorithm)
            try:
                call()
            except RuntimeError as error:
                if refusal(error) is None:
                    raise
                continue
            candidates[algorithm] = call
        samples = interleaved(candidates, rounds, events if device == "cuda" else wall)
        ours: Any = ready.modules["fastlstm"]
        explained = fastlstm.explain(ours, case.batch, case.steps)
        peak = {name: peak_memory(call, device) for name, call in candidates.items()}
    return Timed(case, kind, training, samples, peak, ready, explained)


def _forced(call: Callable[[], object], algorithm: str) -> Callable[[], object]:
    def forced() -> None:
        with fastlstm.algorithm(algorithm):
            call()

    return forced
