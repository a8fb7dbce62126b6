"""What comes before the first fast call: import, the first call, torch.compile: ``make bench``.

Every sample is a new Python, in which torch is imported already when the time begins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import pytest

from ..suite import ROWS, Group
from ..timing import Samples

SIZES, STEPS, BATCH = "64, 64, 2", 20, 8
CASE = f"{SIZES}, batch {BATCH}, {STEPS} steps"
INPUT = f"torch.randn({STEPS}, {BATCH}, 64)"
MAKE = {
    "fastlstm": f"import fastlstm; m = fastlstm.LSTM({SIZES})",
    "torch": f"m = torch.nn.LSTM({SIZES})",
}
START = "import time; t = time.perf_counter()"


def seconds(code: str) -> float:
    """What a new Python takes from START on; nothing compiled before is found again."""
    command = [sys.executable, "-c", f"import torch; {code}; print(time.perf_counter() - t)"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(ran.stdout)


def in_turn(what: str, codes: Mapping[str, str], rounds: int) -> Group:
    found: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            found[name].append(seconds(code))
    group = Group({name: Samples(tuple(values)) for name, values in found.items()})
    times = group.milliseconds()
    ratio = {"ratio": times["torch"] / times["fastlstm"]} if "torch" in times else {}
    ROWS.append({"what": what, "case": CASE if ratio else "after torch", **times, **ratio})
    return group


def test_import(suite):
    codes = {"fastlstm": f"{START}; import fastlstm"}
    rounds = 1 if suite.quick else 5
    suite.report("import", "fastlstm", lambda: in_turn("import fastlstm", codes, rounds))


@pytest.mark.parametrize("backend", list(MAKE))
def test_first_call(backend, suite):
    codes = {name: f"{make}; {START}; m({INPUT})" for name, make in MAKE.items()}
    rounds = 1 if suite.quick else 3
    suite.report("the first call", backend, lambda: in_turn("the first call", codes, rounds))


@pytest.mark.parametrize("backend", list(MAKE))
def test_compile(backend, suite):
    """torch.compile of a module and its first call; nn.LSTM decomposes into its steps.

    Without gradients, for with them torch 2.13 cannot compile its own.
    """
    by = "aot_eager" if suite.quick else "inductor"
    codes = {
        name: f"{make}; import torch._dynamo; torch._dynamo.config.allow_rnn = True; {START}; "
        f"torch.set_grad_enabled(False); torch.compile(m, fullgraph=True, backend='{by}')({INPUT})"
        for name, make in MAKE.items()
    }
    rounds = 1 if suite.quick else 3
    suite.report("torch.compile", backend, lambda: in_turn("torch.compile", codes, rounds))
