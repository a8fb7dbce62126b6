"""The CPU kernels against nn.LSTM and ONNX Runtime: ``make bench-cpu``.

Candidates take turns in one process (timing.py) and medians are compared; pytest-benchmark keeps
our own times, with the ratios beside them in its JSON. The table comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import reference

from .grid import BASE, CPU_CASES, KARPATHY, TYPES, Case
from .onnx_lstm import runner
from .timing import ROUNDS, interleaved_cpu

SENTENCES = Case("H128, batch 16", 128, 128, 2, 16, 100)
cases = pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)


def target(case: Case, kind: str, training: bool) -> tuple[str, float, float]:
    """The design's: its text, the least ratio, the least fraction of the multiply-add peak."""
    if case == KARPATHY and kind == "fp32":
        return (">= 1.4", 1.4, 0.0) if training else (">= 1.08", 1.08, 0.0)
    large = case.hidden_size >= 512 and case.batch >= 32
    if kind == "bf16":
        return (">= 1.3", 1.3, 0.0) if large and training else (">= 1.0", 1.0, 0.0)
    if large:
        return ">= 88 % of peak", 0.95, 0.88
    return ">= 2 in the mean", 0.95, 0.0


@cases
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_against_peers(case, kind, training, benchmark, rows, peak):
    if training and case.steps == 1:
        pytest.skip("nobody trains on one step")
    dtype = TYPES[kind]
    theirs, ours = case.twins(dtype, "cpu")
    x, gradient = case.data(dtype, "cpu")

    def train(module):
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    def infer(module):
        with torch.no_grad():
            module(x)

    call = train if training else infer
    candidates = {"torch": lambda: call(theirs), "ours": lambda: call(ours)}
    if not training and kind == "fp32":
        onnx = runner(theirs, torch.get_num_threads())
        if onnx is not None:
            torch.testing.assert_close(onnx(x), ours(x)[0], atol=1e-4, rtol=1e-4)
            candidates["onnx"] = lambda: onnx(x)
    found = interleaved_cpu(candidates, ROUNDS)
    milliseconds = {name: 1e3 * samples.median for name, samples in found.items()}
    ratio = min(x for name, x in milliseconds.items() if name != "ours") / milliseconds["ours"]
    text, least, least_of_peak = target(case, kind, training)
    row = {
        "what": f"{'training' if training else 'inference'}, {kind}",
        "case": case.name,
        "flops": case.flops(training),
        "bytes": case.bytes(dtype.itemsize),
        **milliseconds,
        "ratio": ratio,
        "target": text,
        "least_of_peak": least_of_peak,
        "met": "" if ratio >= least else "missed",
    }
    rows.append(row)
    benchmark.extra_info.update(row, spread={name: s.spread for name, s in found.items()})
    benchmark.pedantic(candidates["ours"], rounds=1)


@pytest.mark.parametrize("case", [SENTENCES, BASE], ids=lambda case: case.name)
def test_packed_input(case, benchmark, rows):
    """A packed training step beside a padded one of as many rows; then sequences of any length."""
    theirs, ours = case.twins(torch.float32, "cpu")
    x, _ = case.data(torch.float32, "cpu")
    whole = torch.full((case.batch,), case.steps)
    drawn = torch.randint(1, case.steps + 1, (case.batch,))
    inputs = {
        "padded": x,
        "packed, all of length T": pack_padded_sequence(x, whole),
        "packed, lengths 1 to T": pack_padded_sequence(x, drawn, enforce_sorted=False),
    }

    def train(module, given):
        module.zero_grad(set_to_none=True)
        output = module(given)[0]
        (output if isinstance(output, torch.Tensor) else output.data).sum().backward()

    modules = {"ours": ours, "torch": theirs}
    calls = {
        f"{name}, {form}": partial(train, module, given)
        for name, module in modules.items()
        for form, given in inputs.items()
    }
    found = interleaved_cpu(calls, ROUNDS)
    for form in inputs:
        own, other = (1e3 * found[f"{name}, {form}"].median for name in modules)
        row = {"what": "training, packed", "case": f"{case.name}, {form}", "ours": own,
               "torch": other, "ratio": other / own}  # fmt: skip
        if form == "packed, all of length T":
            least = 1e3 * found["ours, padded"].median / 0.9
            row |= {"target": f"<= {least:.3g} ms", "met": "" if own <= least else "missed"}
        rows.append(row)
        benchmark.extra_info[form] = row
    benchmark.extra_info["share of the rows"] = float(drawn.sum()) / (case.batch * case.steps)
    benchmark.pedantic(lambda: train(ours, x), rounds=1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zoneout": {"zoneout_h": 0.1, "zoneout_c": 0.1},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "cell clip": {"cell_clip": 5.0},
    "layer norm": {"layer_norm": True},
}


def test_options(benchmark, rows):
    """A training step with what nn.LSTM lacks, beside one without, and beside PyTorch's steps."""
    x, gradient = BASE.data(torch.float32, "cpu")
    modules = {
        name: fastlstm.LSTM(BASE.input_size, BASE.hidden_size, **options)
        for name, options in OPTIONS.items()
    }

    def train(module):
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    def in_pytorch(options):
        module = fastlstm.LSTM(BASE.input_size, BASE.hidden_size, **options)
        weights = list(module.parameters())
        seed = torch.zeros(1, dtype=torch.int64) if "zoneout_h" in options else None

        def call():
            output, *_ = reference.lstm(
                x, None, None, weights, hidden_size=BASE.hidden_size, seed=seed, **options
            )
            torch.autograd.grad(output, weights, gradient)

        return call

    calls: dict[str, Callable[[], object]] = {
        name: partial(train, module) for name, module in modules.items()
    }
    peers = {f"{name} in PyTorch": in_pytorch(OPTIONS[name]) for name in ("zoneout", "layer norm")}
    found = interleaved_cpu(calls | peers, ROUNDS)
    for name in OPTIONS:
        ours = 1e3 * found[name].median
        row: dict[str, Any] = {
            "what": "training, options", "case": f"{BASE.name}, {name}", "ours": ours,
        }  # fmt: skip
        if (peer := f"{name} in PyTorch") in found:
            row["torch"] = 1e3 * found[peer].median
            row["ratio"] = row["torch"] / ours
        rows.append(row)
        benchmark.extra_info[name] = row
    benchmark.pedantic(calls["plain"], rounds=1)


SCALES = {
    "T": [replace(BASE, steps=steps) for steps in (25, 50, 100, 200, 400)],
    "B": [replace(BASE, batch=batch) for batch in (8, 16, 32, 64, 128)],
    "H": [replace(BASE, input_size=units, hidden_size=units) for units in (64, 128, 256, 512)],
}

NAMES = {"T": "steps", "B": "batch", "H": "hidden_size"}


@pytest.mark.parametrize("axis", [*SCALES, "threads"])
def test_scaling(axis, benchmark, rows, peak):
    """Training along one axis: what a unit of work costs, beside the smallest problem's cost."""
    x = {}
    points = SCALES.get(axis) or [BASE] * torch.get_num_threads()
    before = torch.get_num_threads()
    try:
        for j, case in enumerate(points):
            if axis == "threads":
                torch.set_num_threads(j + 1)
            _, ours = case.twins(torch.float32, "cpu")
            data, gradient = case.data(torch.float32, "cpu")

            def train(ours=ours, data=data, gradient=gradient):
                ours.zero_grad(set_to_none=True)
                ours(data)[0].backward(gradient)

            value = j + 1 if axis == "threads" else getattr(case, NAMES[axis])
            x[value] = interleaved_cpu({"ours": train}, ROUNDS)["ours"].median
    finally:
        torch.set_num_threads(before)
    work = {value: case.flops(True) for value, case in zip(x, points, strict=True)}
    for value, seconds in x.items():
        rows.append({
            "what": f"scaling in {axis}", "case": f"{axis} = {value}", "x": value,
            "ours": 1e3 * seconds, "flops": work[value],
        })  # fmt: skip
    benchmark.extra_info.update(axis=axis, seconds=x)
    benchmark.pedantic(train, rounds=1)
