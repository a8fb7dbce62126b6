"""Drawing text, and one call a time step, beside nn.LSTM: ``make bench-cpu``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import fastlstm

from ..backends import BACKENDS, prepared
from ..cases import KARPATHY, Case
from ..suite import ROWS, Group

WITH_STATES = ["fastlstm", "prepacked", "torch", "compiled"]
RATES: dict[str, float] = {}  # characters a second of each kind of weights


@pytest.mark.parametrize("backend", [*WITH_STATES, "onnxruntime"])
@pytest.mark.parametrize("batch", [1, 8])
def test_streaming(batch, backend, suite):
    """One call a time step, the states handed on, as live speech does.

    ONNX Runtime's graph has no states: each of its steps is a sequence's first.
    """
    case = Case(f"2x512, batch {batch}", 512, 512, 2, batch, 1)

    def measure() -> Group:
        ready = prepared(case, "fp32", False, "cpu", list(BACKENDS))
        x, _ = case.data(torch.float32, "cpu")
        states: dict[str, Any] = {}

        def step(name, module):
            with torch.no_grad():
                _, states[name] = module(x, states.get(name))

        calls = ready.calls | {name: partial(step, name, ready.modules[name])
                               for name in WITH_STATES if name in ready.modules}  # fmt: skip
        group = suite.time(calls, case.flops(False))
        group.absent, group.wrong = ready.absent, ready.wrong
        times = group.milliseconds()
        ratio = min(times[x] for x in ("torch", "onnxruntime") if x in times) / times["fastlstm"]
        ROWS.append({
            "what": "a step a call", "case": case.name, **times, "ratio": ratio,
            "target": ">= 1.0", "met": "" if ratio >= 1 else "missed",
        })  # fmt: skip
        return group

    suite.report(f"a step a call: {case.name}", backend, measure)


@pytest.mark.parametrize("backend", ["fastlstm", "torch"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_generate(weights, backend, suite):
    """Characters a second of a 2x512 model, batch 1, beside a loop over nn.LSTM."""
    length, vocabulary = 30 if suite.quick else 300, KARPATHY.input_size

    def measure() -> Group:
        one = Case("", vocabulary, 512, 2, 1, length)
        theirs, ours = one.twins(torch.float32, "cpu")
        decoder = torch.nn.Linear(512, vocabulary)
        packed = fastlstm.prepack(ours, decoder, weights)
        prime = torch.zeros(1, 1, dtype=torch.int64)

        def loop():
            token, hx = prime, None
            with torch.inference_mode():
                for _ in range(length):
                    one_hot = torch.nn.functional.one_hot(token, vocabulary).float()
                    y, hx = theirs(one_hot, hx)
                    token = torch.multinomial(decoder(y[0]).softmax(-1), 1)

        ours_draws = partial(fastlstm.generate, packed, None, prime, length)
        # Of the products; a character's one-hot row is multiplied by nobody but nn.LSTM.
        flops = one.flops(False) + 2 * (512 - 4 * 512) * vocabulary * length
        group = suite.time({"fastlstm": ours_draws, "torch": loop}, flops)
        times = group.milliseconds()
        for name, ms in times.items():
            group.info[name]["characters_per_second"] = 1e3 * length / ms
        rate = RATES[weights] = 1e3 * length / times["fastlstm"]
        base = RATES.get("fp32", rate)
        least = {"fp32": 7000.0, "bf16": 1.8 * base, "int8": 3 * base}[weights]
        ROWS.append({
            "what": "generate", "case": f"2x512, {weights}: {rate:.0f} characters/s", **times,
            "ratio": times["torch"] / times["fastlstm"], "target": f">= {least:.0f}/s",
            "met": "" if rate >= least else "missed",
        })  # fmt: skip
        return group

    suite.report(f"generate: 2x512, {weights}", backend, measure)
