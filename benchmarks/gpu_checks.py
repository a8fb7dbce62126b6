"""gpu_check's checks: parity, determinism, streams, CUDA graphs, the sanitizer.

Each is a stage: a function of a deadline that returns rows, failures and what was left out. All run
on a CPU too, for the tests' sake.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

import fastlstm
from fastlstm import ops

from .accuracy import candidates_for, distances, precision
from .problems import NORMED, OPTIONS, Problem, Tensors, make, outputs_and_gradients

# Our distance from the float64 reference over torch's own: more is reported.
WORSE_THAN_TORCH = 1.5
LARGER: dict[str, dict[str, Any]] = {
    "H129": {"input_size": 65, "hidden_size": 129, "num_layers": 2, "batch": 33, "steps": 20},
    "H512": {"input_size": 65, "hidden_size": 512, "num_layers": 2, "batch": 100, "steps": 20},
    "H1024": {"input_size": 1024, "hidden_size": 1024, "batch": 64, "steps": 8},
    "H256, both directions": {"hidden_size": 256, "batch": 16, "steps": 50, "bidirectional": True},
    "H512, dropout": {
        "input_size": 65, "hidden_size": 512, "num_layers": 3, "batch": 40, "steps": 10,
        "dropout": 0.5, "index": torch.int64,
    },
}  # fmt: skip


def refusal(error: Exception) -> str | None:
    """Why an algorithm that was asked for does not run a problem; None for any other error."""
    text = str(error).split("\n")[0]
    return text.split("cannot run: ")[1] if "cannot run: " in text else None


def parity(
    end: float, device: str, algorithms: Sequence[str], precisions: Sequence[str], seeds: int,
    problems: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every option, type and algorithm against float64, with torch's own distance beside it."""
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    skipped: list[str] = []
    for name, options in (problems or (OPTIONS | NORMED | LARGER)).items():
        for kind in precisions:
            for algorithm in algorithms:
                row: dict[str, Any] = {"problem": name, "precision": kind, "algorithm": algorithm}
                said = f"{name}, {kind}, {algorithm}"
                if time.monotonic() > end:
                    skipped.append(said)
                    continue
                with precision(kind) as (dtype, _), fastlstm.algorithm(algorithm):
                    problem = Problem(dtype=dtype, **options)
                    try:
                        found = distances(
                            problem, seeds, torch.device(device), candidates_for(problem), kind
                        )
                    except (RuntimeError, ValueError) as error:
                        row["refused"] = refusal(error)
                        if row["refused"] is None:
                            failed.append(f"{said}: {str(error).splitlines()[0]}")
                        rows.append(row)
                        continue
                ours = found["fastlstm"]
                row |= asdict(ours)
                if "torch" in found:
                    row["torch_relative"] = found["torch"].relative
                rows.append(row)
                if not ours.within:
                    failed.append(
                        f"{said}: {ours.where} is off by {ours.relative:.1e}, "
                        f"{ours.limit:.1e} allowed"
                    )
    behind = [
        row for row in rows
        if row.get("relative", 0.0) > WORSE_THAN_TORCH * row.get("torch_relative", torch.inf)
    ]  # fmt: skip
    return {"rows": rows, "behind_torch": behind, "failed": failed, "skipped": skipped}


def _large(device: str, dtype: torch.dtype, **more: Any) -> Tensors:
    sizes = {"hidden_size": 512, "batch": 100, "steps": 50} if device == "cuda" else {}
    p = Problem(input_size=65, num_layers=2, dropout=0.5, dtype=dtype)
    return make(replace(p, **(sizes | more))).to(torch.device(device))


def _results(x: Tensors) -> list[Tensor]:
    outputs, grads = outputs_and_gradients(ops.lstm, x)
    return [*outputs, *grads]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def determinism(end: float, device: str, algorithms: Sequence[str], repeats: int) -> dict[str, Any]:
    """The same call gives the same bits."""
    failed = []
    for algorithm in algorithms:
        with fastlstm.algorithm(algorithm):
            x = _large(device, torch.bfloat16)
            first = _results(x)
            for repeat in range(repeats):
                if not _same(_results(x), first):
                    failed.append(f"{algorithm}: other bits in repeat {repeat}")
                    break
    return {"repeats": repeats, "failed": failed}


def streams(end: float, device: str, algorithms: Sequence[str], repeats: int) -> dict[str, Any]:
    """Two streams at once give what each gives alone."""
    failed = []
    for algorithm in algorithms:
        with fastlstm.algorithm(algorithm):
            problems = [_large(device, torch.bfloat16, random_seed=seed) for seed in range(2)]
            alone = [_results(x) for x in problems]
            if device == "cuda":
                torch.cuda.synchronize()
            own = [torch.cuda.Stream() if device == "cuda" else None for _ in problems]
            for repeat in range(repeats):
                together = []
                for x, stream in zip(problems, own, strict=True):
                    with torch.cuda.stream(stream) if stream else nullcontext():
                        together.append(_results(x))
                if device == "cuda":
                    torch.cuda.synchronize()
                if not all(_same(a, b) for a, b in zip(together, alone, strict=True)):
                    failed.append(f"{algorithm}: other bits in repeat {repeat}")
                    break
    return {"repeats": repeats, "failed": failed}


def graphs(end: float, device: str, algorithms: Sequence[str]) -> dict[str, Any]:
    """Forward and backward captured once, replayed with three new inputs."""
    if device != "cuda":
        return {"skipped": ["CUDA graphs need a GPU"]}
    failed = []
    for algorithm in algorithms:
        with fastlstm.algorithm(algorithm):
            static = _large(device, torch.bfloat16)
            fresh = [_large(device, torch.bfloat16, random_seed=seed) for seed in range(1, 4)]
            arriving = [
                torch.randn_like(y) for y in ops.lstm(*_arguments(static), **static.options)
            ]

            def step(x: Tensors, arriving: list[Tensor] = arriving) -> list[Tensor]:
                outputs = ops.lstm(*_arguments(x), **x.options)
                return [*outputs, *torch.autograd.grad(outputs, x.leaves(), arriving)]

            expected = [step(x) for x in fresh]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = step(static)
            for replay, (x, right) in enumerate(zip(fresh, expected, strict=True)):
                with torch.no_grad():
                    for to, new in zip(static.leaves(), x.leaves(), strict=True):
                        to.copy_(new)
                    static.options["seed"].copy_(x.options["seed"])
                graph.replay()
                torch.cuda.synchronize()
                if not _same(found, right):
                    failed.append(f"{algorithm}: replay {replay} differs from the eager call")
    return {"failed": failed}


def _arguments(x: Tensors) -> tuple[Any, ...]:
    return x.input, x.h0, x.c0, x.weights


def sanitizer(end: float, tools: Sequence[str]) -> dict[str, Any]:
    """compute-sanitizer over small problems, in another process."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(program) or not torch.cuda.is_available():
        return {"skipped": ["no compute-sanitizer or no GPU"]}
    rows, failed, skipped = [], [], []
    for tool in tools:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable]
        command += ["-m", "benchmarks.gpu_check", "--sanitized"]
        # Slowed down so much that no wait may be taken for a hang.
        environment = {
            **os.environ,
            "FASTLSTM_WAIT_SECONDS": "0",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }
        try:
            found = subprocess.run(
                command, env=environment, capture_output=True, text=True,
                timeout=max(10.0, min(120.0, end - time.monotonic())),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            skipped.append(f"{tool}: not done in time")
            continue
        said = (found.stdout + found.stderr).strip().splitlines()
        rows.append({"tool": tool, "status": found.returncode, "said": said[-1:]})
        if found.returncode == 9:
            failed.append(f"{tool}: {[x for x in said if '=====' in x][1:3]}")
        elif found.returncode != 0:
            skipped.append(f"{tool} does not run here: {said[-1:]}")
    return {"rows": rows, "failed": failed, "skipped": skipped}


def sanitized() -> int:
    """The small problems that run under compute-sanitizer."""
    for algorithm in ("stepwise", "persistent"):
        for dtype in (torch.bfloat16, torch.float32):
            for name in ("both directions", "dropout", "index"):
                x = make(Problem(dtype=dtype, **OPTIONS[name])).to(torch.device("cuda"))
                with fastlstm.algorithm(algorithm):
                    _results(x)
    torch.cuda.synchronize()
    return 0
