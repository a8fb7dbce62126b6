"""gpu_check's stages: which tasks each has, and which share a process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..accuracy import PRECISIONS
from ..cases import GPU_CASES, Case
from . import checks, profile, steps, text, times, tools
from .processes import Group, Task

KINDS = ("bf16", "fp16", "tf32", "fp32")
UNTIMED = ("Karpathy's batch, dropout", "three layers")  # like others; `make bench` has them
QUICK = ("Karpathy's batch", "long, H256", "long, H1024", "small")
PROFILED = ("Karpathy's batch", "long, H256", "long, H1024")


def at_once() -> int:
    """How many checks run side by side: each has a busy thread on the host."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def algorithms(device: str) -> list[str]:
    return ["stepwise", "cluster", "grid"] if device == "cuda" else ["auto"]


def groups(
    names: Sequence[str], device: str, quick: bool, cases: Sequence[Case] = tuple(GPU_CASES),
    problems: Sequence[str] = tuple(checks.PROBLEMS),
) -> list[Group]:  # fmt: skip
    """The groups of those stages, in order."""
    made = {
        "parity": lambda: _parity(device, quick, problems),
        "dropin": lambda: _dropin(quick),
        "sanitizer": lambda: _sanitizer(device, quick),
        "determinism": lambda: _each(
            checks.determinism, device, repeats=3 if quick else 10
        ),
        "streams": lambda: _each(checks.streams, device, repeats=3 if quick else 20),
        "graphs": lambda: _each(checks.graphs, device),
        "ceilings": lambda: [[Task("ceilings", times.ceilings, {"device": device}, 60)]],
        "steps": lambda: _steps(device, quick),
        "times": lambda: _times(device, quick, cases),
        "text": lambda: _text(device, quick),
        "profile": lambda: _profile(device, quick, cases),
    }  # fmt: skip
    return [Group(name, tuple(tasks)) for name in names for tasks in made[name]()]


def _parity(device: str, quick: bool, problems: Sequence[str]) -> list[list[Task]]:
    kinds = list(PRECISIONS) if device == "cuda" else ["fp32", "bf16"]
    rest = {"device": device, "seeds": 2 if quick else 5}
    return [
        [
            Task(f"{problem}, {kind}, {algorithm}", checks.parity,
                 {"problem": problem, "kind": kind, "algorithm": algorithm, **rest})
            for problem in problems
            for algorithm in algorithms(device)
        ]
        for kind in kinds
    ]  # fmt: skip


def _each(check: Any, device: str, **rest: Any) -> list[list[Task]]:
    """A process for each algorithm."""
    return [
        [Task(algorithm, check, {"algorithm": algorithm, "device": device, **rest})]
        for algorithm in algorithms(device)
    ]


def _dropin(quick: bool) -> list[list[Task]]:
    seconds = 30.0 if quick else 90.0
    return [
        [Task(path.name, tools.dropin, {"file": str(path), "seconds": seconds}, seconds + 10)]
        for path in tools.cuda_tests()
    ]


def _sanitizer(device: str, quick: bool) -> list[list[Task]]:
    seconds = 30.0 if quick else 90.0
    return [
        [Task(f"{tool}, {algorithm}", tools.sanitizer,
              {"tool": tool, "algorithm": algorithm, "seconds": seconds}, seconds + 10)]
        for tool in (["memcheck"] if quick else ["memcheck", "racecheck"])
        for algorithm in algorithms(device)
    ]  # fmt: skip


def _times(device: str, quick: bool, cases: Sequence[Case]) -> list[list[Task]]:
    """A process for each problem; half types first, for each is held against the best of both."""
    rest = {"device": device, "algorithms": algorithms(device), "rounds": 3 if quick else 5}
    timed = [case for case in cases if case.name not in UNTIMED]
    return [
        [
            Task(f"{case.name}, {kind}, {times.PASSES[training]}", times.times,
                 {"case": asdict(case), "kind": kind, "training": training, **rest})
            for kind in (KINDS[:2] if quick else KINDS)
            for training in (True, False)
        ]
        for case in timed
        if not quick or case.name in QUICK
    ]  # fmt: skip


def _steps(device: str, quick: bool) -> list[list[Task]]:
    """A process for each type; with ``quick`` the layers that have a target, in bf16."""
    asked = [layer for layer, targets in steps.TARGETS.items() if any(targets)]
    others = [layer for layer in steps.TARGETS if layer not in asked]
    exact = [(256, 16), (512, 56), (768, 16)]
    layers = {"bf16": asked + ([] if quick else others)}
    if not quick:
        layers |= {"tf32": exact, "fp32": exact}
    if device != "cuda":
        layers = {"bf16": asked[:1]}
    return [
        [
            Task(f"H{hidden} B{batch}, {kind}, {algorithm}", steps.steps,
                 {"hidden_size": hidden, "batch": batch, "kind": kind, "algorithm": algorithm,
                  "device": device, "rounds": 3 if quick else 5})
            for hidden, batch in of_kind
            for algorithm in algorithms(device)
        ]
        for kind, of_kind in layers.items()
    ]  # fmt: skip


def _text(device: str, quick: bool) -> list[list[Task]]:
    kinds = ("fp32", "bf16", "fp16", "int8") if device == "cuda" else ("fp32",)
    length = 2000 if device == "cuda" else 60
    return [
        [
            Task(f"{weights}, batch {batch}", text.text,
                 {"weights": weights, "batch": batch, "device": device, "length": length,
                  "rounds": 3 if quick else 5})
            for weights in kinds
            for batch in ((1, 64) if quick else (1, 8, 64, 256))
        ]
    ]  # fmt: skip


def _profile(device: str, quick: bool, cases: Sequence[Case]) -> list[list[Task]]:
    names = PROFILED[:1] if quick else PROFILED
    return [
        [
            Task(f"{case.name}, {kind}", profile.profile,
                 {"case": asdict(case), "kind": kind, "device": device})
            for kind in KINDS[:2]
        ]
        for case in cases
        if case.name in names
    ]  # fmt: skip
