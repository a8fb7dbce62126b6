"""What whole calls are expected to take on the GPU of a result, beside what nn.LSTM took there:
at its best, and called eagerly in the same type.

Estimates, never measured: the planner's microseconds of a step (``csrc/cuda/cost_model.h``) times
the steps, the large products around the steps at a share of the rate that the result's GPU reached,
and launches as in a CUDA graph. Not counted: what the planner's own estimates leave out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import fastlstm

from ..accuracy import precision
from ..cases import GPU_CASES, Case
from ..measured import Result
from ..timing import geometric_mean

# Of a large product's rate, and microseconds besides. By these, training at H1024 spends 1.6 ms in
# its products, where 1.4 were measured, and Karpathy's batch 0.2, where it was 0.35 with two
# unaligned products of 0.05, which no call has any more.
SHARE, PRODUCT = 0.9, 5.0
LAUNCH, START = 0.55, 5.0  # microseconds; kGraphLaunch, and kClusterStart
LAUNCHES = {False: 3, True: 9}  # of a layer besides its products and its steps
HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class Expected:
    """One case, precision and pass: milliseconds, theirs measured, ours estimated.

    ``theirs`` is their best time, ``eager`` that of eager calls in each type: both half types,
    which are one estimate of ours.
    """

    case: Case
    kind: str
    training: bool
    algorithms: str
    theirs: float
    eager: dict[str, float]
    ours: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


def _products(case: Case, training: bool) -> Iterator[float]:
    """Operations of each product around the steps; the data need no gradient."""
    directions = 1 + case.bidirectional
    rows = case.steps * case.batch
    for layer in range(case.num_layers):
        width = directions * case.hidden_size if layer else case.input_size
        of_input = 8.0 * rows * width * case.hidden_size * directions
        yield of_input
        if training:
            yield of_input  # the gradient of W_ih
            yield 8.0 * rows * case.hidden_size**2 * directions  # of W_hh
            if layer:
                yield of_input  # of the layer's input


def milliseconds(case: Case, kind: str, training: bool, teraflops: float) -> tuple[float, str]:
    """The estimate for an H200, and the algorithms that the planner takes there."""
    with precision(kind) as (dtype, _):
        lstm = fastlstm.LSTM(
            case.input_size, case.hidden_size, case.num_layers,
            bidirectional=case.bidirectional, dtype=dtype, device="meta",
        )  # fmt: skip
        plan = fastlstm.explain(lstm, case.batch, case.steps, gpu="H200")
    step = plan.step_microseconds or 0.0
    names = [plan.algorithm]
    if training:
        step += plan.backward_step_microseconds or 0.0
        names.append(plan.backward_algorithm)
    rate = 1e6 * teraflops * SHARE
    products = list(_products(case, training))
    passes = case.num_layers * (1 + training)
    around = sum(PRODUCT + product / rate for product in products)
    launches = len(products) + case.num_layers * LAUNCHES[training]
    total = case.steps * step + around + launches * LAUNCH + passes * START
    return total / 1e3, "/".join(dict.fromkeys(names))


def rows(result: Result) -> list[Expected]:
    """Every problem of a GPU's result: half types at their better one, tf32, and fp32."""
    measured = {(r["case"], r["precision"], r["training"]): r for r in result["times"]["rows"]
                if "refused" not in r}  # fmt: skip
    cases = {case.name: case for case in GPU_CASES}
    found = []
    for kind, kinds in (("bf16", HALF), ("tf32", ("tf32",)), ("fp32", ("fp32",))):
        for training in (False, True):
            for name, case in cases.items():
                theirs = {each: measured[name, each, training] for each in kinds
                          if (name, each, training) in measured}  # fmt: skip
                if not theirs:
                    continue
                best = min(r[side] for r in theirs.values() for side in ("torch", "torch_graph"))
                eager = {each: r["torch"] for each, r in theirs.items()}
                teraflops = result["ceilings"][f"{kind}_tflops"]
                ours, algorithms = milliseconds(case, kind, training, teraflops)
                found.append(Expected(case, kind, training, algorithms, best, eager, ours))
    return found


Means = dict[str, list[tuple[float, float]]]


def means(found: list[Expected]) -> Means:
    """By precision, in inference and in training: the ratios' geometric mean, and the least."""
    return _means((row.kind, row.training, row.ratio) for row in found)


def eager_means(found: list[Expected]) -> Means:
    """The same of nn.LSTM's eager calls, each type against ours in that type."""
    return _means(
        (kind, row.training, eager / row.ours) for row in found for kind, eager in row.eager.items()
    )


def _means(ratios: Iterable[tuple[str, bool, float]]) -> Means:
    groups: dict[str, list[list[float]]] = {}
    for kind, training, ratio in ratios:
        groups.setdefault(kind, [[], []])[training].append(ratio)
    return {
        kind: [(geometric_mean(of_pass), min(of_pass)) for of_pass in both if of_pass]
        for kind, both in groups.items()
    }
