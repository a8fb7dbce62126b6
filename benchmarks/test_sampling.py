"""Drawing text, and one call a time step, beside nn.LSTM: ``make bench-cpu``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastlstm

from .grid import KARPATHY, Case
from .onnx_lstm import runner
from .timing import ROUNDS, interleaved_cpu

RATES: dict[str, float] = {}  # characters a second of each kind of weights


@pytest.mark.parametrize("batch", [1, 8])
def test_streaming(batch, benchmark, rows):
    """One call a time step, the states handed on, as live speech does."""
    case = Case("streaming", 512, 512, 2, batch, 1)
    theirs, ours = case.twins(torch.float32, "cpu")
    x, _ = case.data(torch.float32, "cpu")
    states = {"torch": None, "ours": None}

    def step(name, module):
        with torch.no_grad():
            _, states[name] = module(x, states[name])

    candidates = {"torch": lambda: step("torch", theirs), "ours": lambda: step("ours", ours)}
    onnx = runner(theirs, torch.get_num_threads())
    if onnx is not None:
        candidates["onnx"] = lambda: onnx(x)
    samples = interleaved_cpu(candidates, ROUNDS)
    found = {name: 1e3 * s.median for name, s in samples.items()}
    ratio = min(x for name, x in found.items() if name != "ours") / found["ours"]
    row = {
        "what": "a step a call", "case": f"2x512, batch {batch}", **found, "ratio": ratio,
        "target": ">= 1.0", "met": "" if ratio >= 1 else "missed",
    }  # fmt: skip
    rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(candidates["ours"], rounds=1)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_generate(weights, benchmark, rows, quick):
    """Characters a second of a 2x512 model, batch 1, beside a loop over nn.LSTM."""
    length = 30 if quick else 300
    theirs, ours = replace(KARPATHY, dropout=0.0).twins(torch.float32, "cpu")
    decoder = torch.nn.Linear(512, 65)
    packed = fastlstm.prepack(ours, decoder, weights)
    prime = torch.zeros(1, 1, dtype=torch.int64)

    def loop():
        token, hx = prime, None
        with torch.inference_mode():
            for _ in range(length):
                one_hot = torch.nn.functional.one_hot(token, 65).float()
                y, hx = theirs(one_hot, hx)
                token = torch.multinomial(decoder(y[0]).softmax(-1), 1)

    found = interleaved_cpu(
        {"ours": lambda: fastlstm.generate(packed, None, prime, length), "torch": loop}, ROUNDS
    )
    ours_ms, torch_ms = (1e3 * found[name].median for name in ("ours", "torch"))
    rate = length / found["ours"].median
    RATES[weights] = rate
    base = RATES.get("fp32", rate)
    least = {"fp32": 7000.0, "bf16": 1.8 * base, "int8": 3 * base}[weights]
    row = {
        "what": "generate", "case": f"2x512, {weights}: {rate:.0f} characters/s", "ours": ours_ms,
        "torch": torch_ms, "ratio": torch_ms / ours_ms,
        "target": f">= {least:.0f}/s", "met": "" if rate >= least else "missed",
    }  # fmt: skip
    rows.append(row)
    benchmark.extra_info.update(row, characters_per_second=rate)
    benchmark.pedantic(lambda: fastlstm.generate(packed, None, prime, length), rounds=1)
