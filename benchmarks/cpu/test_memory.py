"""Memory of a training step, what is held for backward, recomputation: ``make bench-cpu``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import fastlstm

from ..backends import prepared
from ..cases import BASE, KARPATHY, TYPES
from ..suite import ROWS, Group

CASES = {case.name: case for case in (KARPATHY, BASE)}
LONG = replace(BASE, name="H256, 400 steps", steps=400)


def held(call: Callable[[], Any], known: list[torch.Tensor]) -> float:
    """MB of the tensors that autograd keeps, without those that are known."""
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values()) / 1e6


@pytest.mark.parametrize("backend", ["fastlstm", "torch"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_training_step(name, kind, backend, suite):
    """Held between its passes, and the most that it needs; the rows have MB as others have ms."""

    def measure() -> Group:
        case = suite.sized(CASES[name])
        ready = prepared(case, kind, True, "cpu", ["fastlstm", "torch"])
        x, _ = case.data(TYPES[kind], "cpu")
        group = suite.time(ready.calls, case.flops(True), kind)
        for each, module in ready.modules.items():
            known: Any = [x, *module.parameters()]  # type: ignore[attr-defined]
            group.info[each]["held_megabytes"] = held(partial(module, x), known)
        for what, key in (("held for backward", "held"), ("at the most in a step", "peak")):
            found = {each: info[f"{key}_megabytes"] for each, info in group.info.items()}
            if None in found.values():
                continue
            row: dict[str, Any] = {"what": f"MB {what}", "case": f"{name}, {kind}", **found}
            if key == "held":
                row |= {
                    "ratio": found["torch"] / found["fastlstm"], "target": ">= 1.0",
                    "met": "" if found["fastlstm"] <= found["torch"] else "missed",
                }  # fmt: skip
            ROWS.append(row)
        return group

    suite.report(f"memory of a training step: {name}, {kind}", backend, measure)


EVERY = {"nothing": None, **{f"checkpoint_every={n}": n for n in (10, 20, 40)}}


@pytest.mark.parametrize("recomputed", EVERY)
def test_recomputation(recomputed, suite):
    """A training step with ``checkpoint_every``, beside one that holds everything."""

    def train(module, x, gradient):
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    def measure() -> Group:
        case = replace(suite.sized(LONG), steps=40 if suite.quick else LONG.steps)
        x, gradient = case.data(torch.float32, "cpu")
        calls = {}
        for name, every in EVERY.items():
            module = fastlstm.LSTM(case.input_size, case.hidden_size, checkpoint_every=every)
            calls[name] = partial(train, module, x, gradient)
        group = suite.time(calls, case.flops(True))
        for name, ms in group.milliseconds().items():
            megabytes = group.info[name]["peak_megabytes"] or math.nan
            ROWS.append({
                "what": "recomputation", "case": f"{LONG.name}, {name}: {megabytes:.3g} MB",
                "fastlstm": ms,
            })  # fmt: skip
        return group

    suite.report(f"recomputation: {LONG.name}", recomputed, measure)
