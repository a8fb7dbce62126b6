"""gpu_check's checks by other programs: compute-sanitizer, and the tests marked ``cuda``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fastlstm

from ..accuracy import precision
from ..measured import ROOT
from ..problems import Problem, make
from .checks import PROBLEMS, results

ERROR_STATUS = 9  # compute-sanitizer's, where it saw an error
SANITIZED = ("both directions", "dropout", "index")
# As pytest prints it with two -v; the test that runs has no outcome yet.
LINE = re.compile(
    r"^(\S+\.py::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*)?$", re.MULTILINE
)


def output(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """A command's status (None: it was not done in time) and what it printed until then.

    Into a file, since what it started might keep a pipe open after it was killed.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        status: int | None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
            process.wait()
        file.seek(0)
        return status, file.read()


def sanitizer_program() -> str | None:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return found if os.path.exists(found) and torch.cuda.is_available() else None


def sanitizer(tool: str, algorithm: str, seconds: float) -> dict[str, Any]:
    """compute-sanitizer over small problems, in a process that it watches."""
    program = sanitizer_program()
    name = f"{tool}, {algorithm}"
    if program is None:
        return {"skipped": [f"{name}: no compute-sanitizer or no GPU"]}
    task = {"name": name, "check": f"{__name__}:small", "arguments": {"algorithm": algorithm}}
    command = [program, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), sys.executable]
    command += ["-m", "benchmarks.gpu.worker", json.dumps(task)]
    # Slowed down so much that no wait may be taken for a hang.
    environment = {
        **os.environ,
        "FASTLSTM_WAIT_SECONDS": "0",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    status, text = output(command, seconds, environment)
    if status is None:
        return {"skipped": [f"{name}: not done in {seconds:.0f} s"]}
    row = {"tool": tool, "algorithm": algorithm, "status": status}
    part: dict[str, Any] = {"rows": [row]}
    if status == ERROR_STATUS:
        part["failed"] = [f"{name}: {[x for x in text.splitlines() if '=====' in x][1:3]}"]
    elif answer := re.search(r'^{"failed".*$', text, re.MULTILINE):
        part["failed"] = json.loads(answer[0])["failed"]
    elif status != 0:
        part["skipped"] = [f"{name} does not run here: {text.strip().splitlines()[-1:]}"]
    return part


def small(algorithm: str, device: str = "cuda") -> dict[str, Any]:
    """What runs under compute-sanitizer."""
    for kind in ("bf16", "tf32"):
        with precision(kind) as (dtype, _), fastlstm.algorithm(algorithm):
            for name in SANITIZED:
                results(make(Problem(dtype=dtype, **PROBLEMS[name])).to(torch.device(device)))
    return {}


def cuda_tests() -> list[Path]:
    """The test files of which some tests run the kernels on a GPU alone."""
    files = sorted((ROOT / "tests" / "cuda").glob("test_*.py"))
    return [file for file in files if "pytest.mark.cuda" in file.read_text()]


def dropin(file: str, seconds: float) -> dict[str, Any]:
    """The tests of a file that are marked ``cuda``, in a pytest of their own: failures by name."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-vv", "--tb=line", file]
    status, text = output(command, seconds)
    outcomes = {name.strip(): outcome for name, outcome in LINE.findall(text)}
    ran = {name: outcome for name, outcome in outcomes.items() if outcome != "SKIPPED"}
    row = {"file": Path(file).name, "ran": len(ran), "skipped": len(outcomes) - len(ran)}
    row["failed"] = sum(outcome in ("FAILED", "ERROR") for outcome in ran.values())
    failed = [name for name, outcome in ran.items() if outcome in ("FAILED", "ERROR")]
    if status not in (0, 1, 5):  # 5: nothing is marked so
        running = [name for name, outcome in ran.items() if not outcome] or ["no test"]
        how = f"not done in {seconds:.0f} s" if status is None else f"exit status {status}"
        failed.append(f"{Path(file).name}: {how}, {running[-1]} was running")
    return {"rows": [row], "failed": failed}
