"""The CUDA kernels against every peer that is installed: ``make bench`` on a GPU machine.

``make gpu-check`` checks them first, and times them against nn.LSTM alone.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from ..backends import BACKENDS
from ..cases import GPU_CASES
from ..machine import CEILINGS
from ..suite import ROWS, Group
from .stages import KINDS, algorithms
from .times import TARGETS, ceilings, timed

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU that torch can use", allow_module_level=True)

CASES = {case.name: case for case in GPU_CASES}
ALGORITHMS = algorithms("cuda")  # of ours, forced
GRID = [
    pytest.param(case.name, kind, training, name, id="-".join((
        case.name, kind, "training" if training else "inference", name,
    )))
    for kind in KINDS
    for case in GPU_CASES
    for training in (True, False)
    for name in [*BACKENDS, *ALGORITHMS]
    if name in ALGORITHMS or BACKENDS[name].runs(case, kind, training, "cuda")
]  # fmt: skip


@functools.cache
def measured() -> None:
    for name, rate in ceilings("cuda").items():
        what, unit = name.split("_", 1)
        CEILINGS[f"gpu_{what}"] = rate * (1e12 if unit == "tflops" else 1e9)


@pytest.mark.parametrize(("name", "kind", "training", "candidate"), GRID)
def test_against_peers(name, kind, training, candidate, suite):
    what = f"gpu, {'training' if training else 'inference'}, {kind}"

    def measure() -> Group:
        measured()
        case = suite.sized(CASES[name])
        rounds = 3 if suite.quick else 7
        found = timed(case, kind, training, "cuda", ALGORITHMS, rounds, list(BACKENDS))
        group = Group(found.samples, absent=found.ready.absent, wrong=found.ready.wrong)
        row, flops = found.row(), case.flops(training)
        for each in group.samples:
            held = found.peak_bytes[each]
            group.info[each] = {
                "peak_megabytes": None if held is None else held / 1e6, "flops": flops,
                "ceiling": f"gpu_{kind}",
            }  # fmt: skip
        group.info["fastlstm"] |= {
            key: row[key] for key in ("algorithm", "backward_algorithm", "step_microseconds")
        }
        for algorithm in set(ALGORITHMS) - set(group.samples):
            group.absent[algorithm] = found.refused[algorithm]
        asks = TARGETS.get(name) if training and kind == "bf16" else None
        met = row["ratio"] >= 1 and row["fastlstm"] <= (asks or math.inf)
        ROWS.append({
            "what": what, "case": name, "flops": flops, "ceiling": f"gpu_{kind}",
            **found.milliseconds(), "ratio": row["ratio"],
            "target": f">= 1.0, <= {asks} ms" if asks else ">= 1.0",
            "met": "" if met else "missed", **group.notes(),
        })  # fmt: skip
        return group

    suite.report(f"{what}: {name}", candidate, measure, "cuda")
