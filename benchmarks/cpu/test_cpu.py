"""The CPU kernels against nn.LSTM, compiled and not, and ONNX Runtime: ``make bench-cpu``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import _C, reference
from fastlstm.stack import Call

from ..backends import BACKENDS, prepared
from ..cases import BASE, CPU_CASES, KARPATHY, TYPES, Case
from ..machine import ceiling
from ..suite import ROWS, Group, Suite

CASES = {case.name: case for case in CPU_CASES}
# A group's tests follow each other: the backend changes fastest.
GRID = [
    pytest.param(case.name, kind, training, backend, id="-".join((
        case.name, kind, "training" if training else "inference", backend,
    )))
    for training in (False, True)
    for kind in TYPES
    for case in CPU_CASES
    for backend in BACKENDS
    if BACKENDS[backend].runs(case, kind, training, "cpu")
    and not (training and case.steps == 1)  # nobody trains on one step
]  # fmt: skip


def target(case: Case, kind: str, training: bool) -> tuple[str, float, float]:
    """The design's: its text, the least ratio, the least fraction of the multiply-add peak."""
    if case == KARPATHY and kind == "fp32":
        return (">= 1.4", 1.4, 0.0) if training else (">= 1.08", 1.08, 0.0)
    large = case.hidden_size >= 512 and case.batch >= 32
    if kind == "bf16":
        if large and training:
            if "amx" in _C.cpu_selected():  # the design's share is of products in pairs
                return ">= 1.3", 1.3, 0.0
            return ">= 1.3, >= 75 % of peak", 1.3, 0.75
        return ">= 1.0", 1.0, 0.0
    if large:
        return ">= 88 % of peak", 0.95, 0.88
    return ">= 2 in the mean", 0.95, 0.0


@pytest.mark.parametrize(("name", "kind", "training", "backend"), GRID)
def test_against_peers(name, kind, training, backend, suite):
    case = CASES[name]
    what = f"{'training' if training else 'inference'}, {kind}"

    def measure() -> Group:
        sized = suite.sized(case)
        ready = prepared(sized, kind, training, "cpu")
        group = suite.time(ready.calls, sized.flops(training), kind)
        group.absent, group.wrong = ready.absent, ready.wrong
        times = group.milliseconds()
        ratio = min(times[x] for x in ("torch", "onnxruntime") if x in times) / times["fastlstm"]
        text, least, least_of_peak = target(case, kind, training)
        ROWS.append({
            "what": what, "case": case.name, "flops": sized.flops(training),
            "bytes": sized.bytes(TYPES[kind].itemsize), "ceiling": ceiling(kind), **times,
            "ratio": ratio, "target": text, "least_of_peak": least_of_peak,
            "met": "" if ratio >= least else "missed", **group.notes(),
        })  # fmt: skip
        return group

    suite.report(f"{what}: {case.name}", backend, measure)


PACKED = {case.name: case for case in (Case("H128, batch 16", 128, 128, 2, 16, 100), BASE)}
FORMS = ["padded", "packed, all of length T", "packed, lengths 1 to T"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["fastlstm", "torch"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_input(name, backend, form, suite):
    """A packed training step beside a padded one of as many rows; then sequences of any length."""
    case = PACKED[name]

    def train(module, given):
        module.zero_grad(set_to_none=True)
        output = module(given)[0]
        (output if isinstance(output, torch.Tensor) else output.data).sum().backward()

    def measure() -> Group:
        sized = suite.sized(case)
        theirs, ours = sized.twins(torch.float32, "cpu")
        x, _ = sized.data(torch.float32, "cpu")
        drawn = torch.randint(1, sized.steps + 1, (sized.batch,))
        inputs: dict[str, Any] = dict(zip(FORMS, (
            x, pack_padded_sequence(x, torch.full((sized.batch,), sized.steps)),
            pack_padded_sequence(x, drawn, enforce_sorted=False),
        ), strict=True))  # fmt: skip
        calls = {
            f"{name}, {form}": partial(train, module, given)
            for form, given in inputs.items()
            for name, module in (("fastlstm", ours), ("torch", theirs))
        }
        group = suite.time(calls)
        times = group.milliseconds()
        share = float(drawn.sum()) / (sized.batch * sized.steps)
        for form in FORMS:
            own, other = times[f"fastlstm, {form}"], times[f"torch, {form}"]
            row = {"what": "training, packed", "case": f"{case.name}, {form}", "fastlstm": own,
                   "torch": other, "ratio": other / own}  # fmt: skip
            if form == "packed, all of length T":
                least = times["fastlstm, padded"] / 0.9
                row |= {"target": f"<= {least:.3g} ms", "met": "" if own <= least else "missed"}
            ROWS.append(row)
            rows = share if form == "packed, lengths 1 to T" else 1.0
            for name in ("fastlstm", "torch"):
                group.info[f"{name}, {form}"] |= {
                    "flops": rows * sized.flops(True), "ceiling": ceiling("fp32"),
                }  # fmt: skip
        return group

    suite.report(f"training, packed: {case.name}", f"{backend}, {form}", measure)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zoneout": {"zoneout_h": 0.1, "zoneout_c": 0.1},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "cell clip": {"cell_clip": 5.0},
    "layer norm": {"layer_norm": True},
}
IN_PYTORCH = ["zoneout", "layer norm"]


def in_pytorch(case: Case, x: torch.Tensor, gradient: torch.Tensor, options: Any) -> Any:
    """A training step of the same cells, written in PyTorch's own operators."""
    lstm = fastlstm.LSTM(case.input_size, case.hidden_size, **options)
    weights = list(lstm.parameters())
    seed = torch.zeros(1, dtype=torch.int64) if "zoneout_h" in options else None

    def call():
        output, *_ = reference.lstm(x, None, weights, lstm.stack, Call(seed=seed))
        torch.autograd.grad(output, weights, gradient)

    return call


@pytest.mark.parametrize("name", [*OPTIONS, *(f"{name} in PyTorch" for name in IN_PYTORCH)])
def test_options(name, suite):
    """A training step with what nn.LSTM lacks, beside one without, and beside PyTorch's steps."""

    def train(module, x, gradient):
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    def measure() -> Group:
        case = suite.sized(BASE)
        x, gradient = case.data(torch.float32, "cpu")
        calls: dict[str, Callable[[], object]] = {
            name: partial(
                train, fastlstm.LSTM(case.input_size, case.hidden_size, **options), x, gradient
            )
            for name, options in OPTIONS.items()
        }
        for name in IN_PYTORCH:
            calls[f"{name} in PyTorch"] = in_pytorch(case, x, gradient, OPTIONS[name])
        group = suite.time(calls, case.flops(True))
        times = group.milliseconds()
        for name in OPTIONS:
            row: dict[str, Any] = {"what": "training, options", "case": f"{BASE.name}, {name}",
                                   "fastlstm": times[name]}  # fmt: skip
            if name in IN_PYTORCH:
                row["torch"] = times[f"{name} in PyTorch"]
                row["ratio"] = row["torch"] / times[name]
            ROWS.append(row)
        return group

    suite.report(f"training, options: {BASE.name}", name, measure)


SCALES = {
    "T": [(steps, replace(BASE, steps=steps)) for steps in (25, 50, 100, 200, 400)],
    "B": [(batch, replace(BASE, batch=batch)) for batch in (8, 16, 32, 64, 128)],
    "H": [(n, replace(BASE, input_size=n, hidden_size=n)) for n in (64, 128, 256, 512)],
    "threads": [(n, BASE) for n in range(1, torch.get_num_threads() + 1)],
}
POINTS = [(axis, value) for axis, points in SCALES.items() for value, _ in points]


@pytest.mark.parametrize(("axis", "value"), POINTS)
def test_scaling(axis, value, suite):
    """Training along one axis: what a unit of work costs, beside the smallest problem's cost."""
    suite.report(f"scaling in {axis}", f"{axis} = {value}", partial(along, axis, suite))


def along(axis: str, suite: Suite) -> Group:
    found = Group({})
    before = torch.get_num_threads()
    try:
        for value, case in SCALES[axis]:
            if axis == "threads":
                torch.set_num_threads(value)
            sized, name = suite.sized(case), f"{axis} = {value}"
            call = prepared(sized, "fp32", True, "cpu", ["fastlstm"]).calls["fastlstm"]
            point = suite.time({name: call}, sized.flops(True))
            found.samples |= point.samples
            found.info |= point.info
            ROWS.append({
                "what": f"scaling in {axis}", "case": name, "x": value,
                "fastlstm": point.milliseconds()[name], "flops": sized.flops(True),
                "ceiling": ceiling("fp32"),
            })  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return found
