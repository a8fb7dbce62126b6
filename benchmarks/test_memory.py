"""What is held for backward, and what recomputation saves and costs: ``make bench-cpu``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import fastlstm

from .grid import BASE, KARPATHY, TYPES, Case
from .timing import interleaved_cpu

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


def peak_of_a_step(case: Case, every: int | None) -> float:
    """MB by which a training step raises the most that a new process ever held."""
    code = f"""
import torch, fastlstm
m = fastlstm.LSTM({case.input_size}, {case.hidden_size}, checkpoint_every={every})
x = torch.randn({case.steps}, {case.batch}, {case.input_size})
def step(x):
    m(x)[0].sum().backward()
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3
step(x[:2])
before = peak()
step(x)
print(peak() - before)"""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", [KARPATHY, BASE], ids=lambda case: case.name)
def test_memory_held_for_backward(case, kind, benchmark, rows, quick):
    """In the times' columns, MB."""
    case = replace(case, batch=2, steps=5) if quick else case
    theirs, ours = case.twins(TYPES[kind], "cpu")
    x, _ = case.data(TYPES[kind], "cpu")
    found = {
        name: held(partial(module, x), [x, *module.parameters()])
        for name, module in (("torch", theirs), ("ours", ours))
    }
    row = {
        "what": "MB held for backward", "case": f"{case.name}, {kind}", **found,
        "ratio": found["torch"] / found["ours"], "target": ">= 1.0",
        "met": "" if found["ours"] <= found["torch"] else "missed",
    }  # fmt: skip
    rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: ours(x), rounds=1)


def test_recomputation(benchmark, rows, quick):
    """A training step with ``checkpoint_every``, beside one that holds everything."""
    case = replace(LONG, batch=2, steps=40) if quick else LONG
    _, plain = case.twins(torch.float32, "cpu")
    x, gradient = case.data(torch.float32, "cpu")
    modules = {"nothing": plain}
    for every in (10, 20, 40):
        lean = fastlstm.LSTM(case.input_size, case.hidden_size, checkpoint_every=every)
        lean.load_state_dict(plain.state_dict())
        modules[f"checkpoint_every={every}"] = lean

    def train(module):
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    calls = {name: partial(train, module) for name, module in modules.items()}
    found = interleaved_cpu(calls, 5)
    for name in modules:
        megabytes = peak_of_a_step(case, int(name.split("=")[1]) if "=" in name else None)
        rows.append({
            "what": "recomputation", "case": f"{case.name}, {name}: {megabytes:.3g} MB",
            "ours": 1e3 * found[name].median,
        })  # fmt: skip
        benchmark.extra_info[name] = {"ms": 1e3 * found[name].median, "MB": megabytes}
    benchmark.pedantic(calls["nothing"], rounds=1)
