"""The GPU's times: its ceilings, and problems against ``nn.LSTM``, eager and as CUDA graphs.

For gpu_check and test_gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastlstm

from ..accuracy import precision
from ..backends import Prepared, prepared
from ..cases import Case
from ..machine import peak_memory
from ..timing import Samples, events, interleaved, wall
from .checks import captured, refusal

# Milliseconds of forward and backward in bf16 that the design asks for on an H200.
TARGETS = {
    "Karpathy's batch": 1.1,
    "Karpathy's batch, dropout": 1.1,
    "long, H1024": 4.8,
    "long, H256": 3.0,
}
PASSES = {True: "train", False: "infer"}


def ceilings(
    device: str, precisions: Sequence[str] = ("bf16", "fp16", "tf32", "fp32")
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


def times(
    case: dict[str, Any], kind: str, training: bool, device: str, algorithms: Sequence[str],
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """A problem's row; one more for each algorithm that refuses it; graphs that failed."""
    found = timed(Case(**case), kind, training, device, algorithms, rounds, graphs=True)
    what = {"case": case["name"], "precision": kind, "training": training}
    refused = [
        what | {"algorithm": algorithm, "refused": reason}
        for algorithm, reason in found.refused.items()
    ]
    part: dict[str, Any] = {"rows": [found.row(), *refused]}
    for name, reason in found.uncaptured.items():
        kept = part.setdefault("skipped" if name == "torch" else "failed", [])
        kept.append(f"{case['name']}, {kind}, {PASSES[training]}: no graph of {name}: {reason}")
        part["over"] = True
    return part


@dataclass
class Timed:
    """One problem's candidates: backends by name, our algorithms that were forced, and graphs."""

    case: Case
    kind: str
    training: bool
    ready: Prepared
    explained: Any
    samples: dict[str, Samples] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # our algorithms, and why
    uncaptured: dict[str, str] = field(default_factory=dict)

    def milliseconds(self) -> dict[str, float]:
        return {name: 1e3 * samples.median for name, samples in self.samples.items()}

    def step_estimate(self) -> float | None:
        """Microseconds of a step of all layers, forward or both, as the planner has them."""
        step: float | None = self.explained.step_microseconds
        if self.training and step is not None:
            step += self.explained.backward_step_microseconds or 0.0
        return step

    def row(self) -> dict[str, Any]:
        """Milliseconds by candidate, and nn.LSTM's time over ours, eager and as graphs."""
        ms = self.milliseconds()
        best = ms.get("fastlstm_graph", ms["fastlstm"])
        graphs = {"torch_graph", "fastlstm_graph"} <= set(ms)
        return {
            "case": self.case.name,
            "sizes": self.case.sizes(),
            "precision": self.kind,
            "training": self.training,
            "algorithm": self.explained.algorithm,
            "backward_algorithm": self.explained.backward_algorithm,
            **ms,
            "ratio": ms["torch"] / ms["fastlstm"],
            "graph_ratio": ms["torch_graph"] / ms["fastlstm_graph"] if graphs else None,
            "eager_ratio": ms["torch"] / ms["fastlstm_graph"] if "fastlstm_graph" in ms else None,
            "flattened": flattened(self.ready.modules["torch"]),
            "step_microseconds": 1e3 * best / self.case.steps,
            "estimated_step_microseconds": self.step_estimate(),
            "teraflops": self.case.flops(self.training) / best / 1e9,
            "spread": max(samples.spread for samples in self.samples.values()),
            **{f"{name}_peak_bytes": self.peak_bytes[name] for name in ("torch", "fastlstm")},
            "target_milliseconds": (
                TARGETS.get(self.case.name) if self.training and self.kind == "bf16" else None
            ),
        }


def flattened(lstm: Any) -> bool | None:
    """Whether an nn.LSTM's weights lie in one piece, as cuDNN wants them; None on a CPU.

    torch leaves them apart in bfloat16, and cuDNN then copies them in every call.
    """
    weights = list(nn.Module.parameters(lstm))
    if not weights[0].is_cuda:
        return None
    return len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def timed(
    case: Case, kind: str, training: bool, device: str, algorithms: Sequence[str], rounds: int,
    backends: Sequence[str] = ("torch", "fastlstm"), graphs: bool = False,
) -> Timed:  # fmt: skip
    """Time backends, and ours with each algorithm that can run the problem, in turn.

    With ``graphs``, on CUDA: backends eager and as graphs (``torch_graph``), and our algorithms as
    graphs alone where the planner took another.
    """
    with precision(kind):
        ready = prepared(case, kind, training, device, backends)
        ours: Any = ready.modules["fastlstm"]
        found = Timed(case, kind, training, ready, fastlstm.explain(ours, case.batch, case.steps))
        candidates = dict(ready.calls)
        forced = _forced(ready.calls["fastlstm"], algorithms, found.refused)
        if not graphs:
            candidates |= forced
        elif device == "cuda":
            taken = {found.explained.algorithm, found.explained.backward_algorithm}
            others = {name: call for name, call in forced.items() if {name} != taken}
            candidates |= _graphs(ready.calls | others, found.uncaptured)
        found.samples = interleaved(candidates, rounds, events if device == "cuda" else wall)
        found.peak_bytes = {name: peak_memory(call, device) for name, call in candidates.items()}
    return found


def _forced(
    call: Callable[[], object], algorithms: Sequence[str], refused: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """The call by each algorithm that runs it; what the others say is left in ``refused``."""

    def by(algorithm: str) -> None:
        with fastlstm.algorithm(algorithm):
            call()

    found: dict[str, Callable[[], object]] = {}
    for algorithm in algorithms:
        if algorithm == "auto":
            continue
        try:
            by(algorithm)
        except (RuntimeError, ValueError) as error:
            reason = refusal(error)
            if reason is None:
                raise
            refused[algorithm] = reason
        else:
            found[algorithm] = lambda algorithm=algorithm: by(algorithm)  # type: ignore[misc]
    return found


def _graphs(
    calls: dict[str, Callable[[], object]], uncaptured: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """Replays of each call's graph; why there is none is left in ``uncaptured``."""
    found: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        try:
            graph, _ = captured(call)
        except RuntimeError as error:
            uncaptured[name] = str(error).splitlines()[0]
        else:
            found[f"{name}_graph"] = graph.replay
    return found
