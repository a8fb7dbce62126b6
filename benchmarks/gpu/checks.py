"""gpu_check's checks in a process: parity, determinism, streams, CUDA graphs.

Each returns a part of the report: rows, and the texts of what failed and what was left out. All run
on a CPU too, for the tests' sake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor

import fastlstm
from fastlstm import ops

from ..accuracy import candidates_for, distances, precision
from ..problems import NORMED, OPTIONS, Problem, Tensors, make, outputs_and_gradients

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
PROBLEMS = OPTIONS | NORMED | LARGER


def refusal(error: Exception) -> str | None:
    """Why an algorithm that was asked for does not run a problem; None for any other error."""
    text = (str(error).splitlines() or [""])[0]
    return text.split("cannot run: ")[1] if "cannot run: " in text else None


def parity(problem: str, kind: str, algorithm: str, device: str, seeds: int) -> dict[str, Any]:
    """A problem in a type by an algorithm against float64, with torch's own distance beside it."""
    row: dict[str, Any] = {"problem": problem, "precision": kind, "algorithm": algorithm}
    with precision(kind) as (dtype, _), fastlstm.algorithm(algorithm):
        p = Problem(dtype=dtype, **PROBLEMS[problem])
        try:
            found = distances(p, seeds, torch.device(device), candidates_for(p), kind)
        except (RuntimeError, ValueError) as error:
            reason = refusal(error)
            if reason is None:
                raise
            return {"rows": [row | {"refused": reason}]}
    ours = found["fastlstm"]
    row |= asdict(ours)
    if "torch" in found:
        row["torch_relative"] = found["torch"].relative
    off = f"{problem}, {kind}, {algorithm}: {ours.where} is off by {ours.relative:.1e}"
    off += f", {ours.limit:.1e} allowed"
    return {"rows": [row], "failed": [] if ours.within else [off]}


def _large(device: str, **more: Any) -> Tensors:
    sizes = {"hidden_size": 512, "batch": 100, "steps": 50} if device == "cuda" else {}
    p = Problem(input_size=65, num_layers=2, dropout=0.5, dtype=torch.bfloat16)
    return make(replace(p, **(sizes | more))).to(torch.device(device))


def results(x: Tensors) -> list[Tensor]:
    outputs, grads = outputs_and_gradients(ops.lstm, x)
    return [*outputs, *grads]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def determinism(algorithm: str, device: str, repeats: int) -> dict[str, Any]:
    """The same call gives the same bits."""
    failed = []
    with fastlstm.algorithm(algorithm):
        x = _large(device)
        first = results(x)
        for repeat in range(repeats):
            if not _same(results(x), first):
                failed.append(f"{algorithm}: other bits in repeat {repeat}")
                break
    return {"rows": [{"algorithm": algorithm, "repeats": repeats}], "failed": failed}


def streams(algorithm: str, device: str, repeats: int) -> dict[str, Any]:
    """Two streams at once give what each gives alone."""
    failed = []
    with fastlstm.algorithm(algorithm):
        problems = [_large(device, random_seed=seed) for seed in range(2)]
        alone = [results(x) for x in problems]
        if device == "cuda":
            torch.cuda.synchronize()
        own = [torch.cuda.Stream() if device == "cuda" else None for _ in problems]
        for repeat in range(repeats):
            together = []
            for x, stream in zip(problems, own, strict=True):
                with torch.cuda.stream(stream) if stream else nullcontext():
                    together.append(results(x))
            if device == "cuda":
                torch.cuda.synchronize()
            if not all(_same(a, b) for a, b in zip(together, alone, strict=True)):
                failed.append(f"{algorithm}: other bits in repeat {repeat}")
                break
    return {"rows": [{"algorithm": algorithm, "repeats": repeats}], "failed": failed}


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call, after three on a stream of their own; and what the call returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


def graphs(algorithm: str, device: str) -> dict[str, Any]:
    """Forward and backward captured once, replayed with three new inputs."""
    if device != "cuda":
        return {"skipped": ["CUDA graphs need a GPU"]}
    failed = []
    with fastlstm.algorithm(algorithm):
        static = _large(device)
        fresh = [_large(device, random_seed=seed) for seed in range(1, 4)]
        arriving = [torch.randn_like(y) for y in ops.lstm(*static.arguments)]

        def step(x: Tensors) -> list[Tensor]:
            outputs = ops.lstm(*x.arguments)
            return [*outputs, *torch.autograd.grad(outputs, x.leaves(), arriving)]

        expected = [step(x) for x in fresh]
        graph, found = captured(lambda: step(static))
        for replay, (x, right) in enumerate(zip(fresh, expected, strict=True)):
            with torch.no_grad():
                for to, new in zip(static.leaves(), x.leaves(), strict=True):
                    to.copy_(new)
                cast(Tensor, static.call.seed).copy_(cast(Tensor, x.call.seed))
            graph.replay()
            torch.cuda.synchronize()
            if not _same(found, right):
                failed.append(f"{algorithm}: replay {replay} differs from the eager call")
    return {"rows": [{"algorithm": algorithm, "replays": len(fresh)}], "failed": failed}
