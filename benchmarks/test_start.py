"""What comes before the first fast call: import, the first call, torch.compile: ``make bench``."""

from __future__ import annotations

import subprocess
import sys
import time

import torch

from .grid import Case

SMALL = Case("H64", 64, 64, 2, 8, 20)


def process(code: str) -> float:
    """Seconds that a new Python says."""
    command = [sys.executable, "-c", f"import time, torch; t = time.perf_counter(); {code}; "
               "print(time.perf_counter() - t)"]  # fmt: skip
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_import(benchmark, rows, quick):
    """Beside torch, which is imported before."""
    seconds = sorted(process("import fastlstm") for _ in range(1 if quick else 5))
    row = {
        "what": "import fastlstm",
        "case": "after torch",
        "ours": 1e3 * seconds[len(seconds) // 2],
    }
    rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=1)


def test_first_call(benchmark, rows):
    calls = {
        "ours": "import fastlstm; m = fastlstm.LSTM(64, 64, 2)",
        "torch": "m = torch.nn.LSTM(64, 64, 2)",
    }
    found = {
        name: 1e3 * process(f"{make}; t = time.perf_counter(); m(torch.randn(20, 8, 64))")
        for name, make in calls.items()
    }
    row = {"what": "the first call", "case": SMALL.name, **found,
           "ratio": found["torch"] / found["ours"]}  # fmt: skip
    rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=1)


def test_compile(benchmark, rows, quick):
    """torch.compile of a module and its first call; nn.LSTM decomposes into its steps.

    Without gradients, for with them torch 2.13 cannot compile its own.
    """
    backend = "aot_eager" if quick else "inductor"
    theirs, ours = SMALL.twins(torch.float32, "cpu")
    x, _ = SMALL.data(torch.float32, "cpu")
    before = torch._dynamo.config.allow_rnn
    found = {}
    try:
        torch._dynamo.config.allow_rnn = True
        for name, module in (("ours", ours), ("torch", theirs)):
            torch._dynamo.reset()
            start = time.perf_counter()
            compiled = torch.compile(module, fullgraph=True, backend=backend)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x)[0], module(x)[0], atol=1e-5, rtol=1e-5)
            found[name] = 1e3 * (time.perf_counter() - start)
    finally:
        torch._dynamo.config.allow_rnn = before
    row = {"what": "torch.compile", "case": f"{SMALL.name}, {SMALL.steps} steps", **found,
           "ratio": found["torch"] / found["ours"]}  # fmt: skip
    rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=1)
