"""The benchmark suite runs: tiny problems, whose times mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[1]
FILES = ["sampling", "training", "memory", "start"]


def test_every_file_of_the_suite_runs(tmp_path):
    path = tmp_path / "found.json"
    files = [f"benchmarks/test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "--quick", *files, f"--benchmark-json={path}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    found = json.loads(path.read_text())["fastlstm"]
    whats = {row["what"] for row in found["rows"]}
    assert whats == {
        "a step a call", "generate", "a training step", "outside the LSTM", "MB held for backward",
        "recomputation", "import fastlstm", "the first call", "torch.compile",
    }  # fmt: skip
    assert len(found["commit"]) == 40
