"""The benchmark suite runs: tiny problems, whose times mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("safetensors")

from benchmarks.backends import BACKENDS
from benchmarks.cases import CPU_CASES
from benchmarks.tables import TITLES

ROOT = Path(__file__).parents[2]
HERE = {name for name, x in BACKENDS.items() if "cpu" in x.devices and not x.missing()}


def suite(path, *files):
    """Run files of the suite with --quick; their JSON, and what was printed."""
    command = [sys.executable, "-m", "pytest", "--quick", "-rs", f"--benchmark-json={path}"]
    names = [f"benchmarks/{'gpu' if name == 'gpu' else 'cpu'}/test_{name}.py" for name in files]
    # Benchmarks do not run in a test worker, which the environment would tell.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    ran = subprocess.run(
        [*command, *names], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode in (0, 5), ran.stdout
    return json.loads(path.read_text() or "{}"), ran.stdout


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    return suite(tmp_path_factory.mktemp("cpu") / "found.json", "cpu")[0]


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    files = ("sampling", "training", "memory", "start")
    return suite(tmp_path_factory.mktemp("rest") / "found.json", *files)[0]


def by_group(found):
    groups = {}
    for test in found["benchmarks"]:
        groups.setdefault(test["group"], {})[test["extra_info"]["candidate"]] = test
    return groups


def whats(found):
    return {row["what"] for row in found["fastlstm"]["rows"]}


def test_every_backend_has_its_part_in_the_group_of_every_problem(cpu):
    groups = by_group(cpu)
    for case in CPU_CASES:
        for kind in ("fp32", "bf16"):
            for what in ("inference", "training"):
                name = f"{what}, {kind}: {case.name}"
                if what == "training" and case.steps == 1:
                    assert name not in groups
                    continue
                runs = {b for b in HERE if BACKENDS[b].runs(case, kind, what == "training", "cpu")}
                assert {"fastlstm", "torch", "compiled"} <= set(groups[name]) == runs
    if "onnxruntime" in HERE:
        assert "onnxruntime" in groups["inference, fp32: small"]
    assert set(groups["training, options: H256"]) > {"plain", "zoneout", "zoneout in PyTorch"}
    assert len(groups["training, packed: H256"]) == 6
    assert {f"scaling in {axis}" for axis in ("T", "B", "H", "threads")} <= set(groups)


def test_every_file_of_the_suite_runs(cpu, rest):
    assert whats(cpu) > {"inference, fp32", "training, bf16", "training, packed", "scaling in T"}
    assert whats(rest) == {
        "a step a call", "generate", "a training step", "outside the LSTM", "MB held for backward",
        "MB at the most in a step", "recomputation", "import fastlstm", "the first call",
        "torch.compile",
    }  # fmt: skip
    assert len(rest["fastlstm"]["commit"]) == 40
    groups = by_group(rest)
    assert {"fastlstm", "torch"} == set(groups["memory of a training step: H256, fp32"])
    assert {"fastlstm", "torch", "compiled"} <= set(groups["a step a call: 2x512, batch 1"])
    assert {"fastlstm", "torch"} == set(groups["generate: 2x512, int8"])


def test_every_test_says_what_it_measured_and_on_what(cpu, rest):
    for test in cpu["benchmarks"] + rest["benchmarks"]:
        info, stats = test["extra_info"], test["stats"]
        assert {"device", "torch", "fastlstm", "python", "commit"} <= set(info)
        assert stats["rounds"] == len(stats["data"]) >= 1
        if test["group"] in ("import", "the first call", "torch.compile"):
            continue
        assert stats["rounds"] == 3
        assert info["gflops"] == pytest.approx(info["flops"] / stats["median"] / 1e9)
        assert info["peak_megabytes"] >= 0
        if info["ceiling"] in cpu["fastlstm"]["ceilings"]:
            assert 0 < info["of_ceiling"] < 1.2
        if info["candidate"] == "onnxruntime":
            assert info["onnxruntime"] == BACKENDS["onnxruntime"].version()


def test_rows_have_the_medians_of_the_samples(cpu):
    groups = by_group(cpu)
    rows = [row for row in cpu["fastlstm"]["rows"] if "bytes" in row]
    assert len(rows) == 2 * len(CPU_CASES) + 2 * sum(case.steps > 1 for case in CPU_CASES)
    for row in rows:
        tests = groups[f"{row['what']}: {row['case']}"]
        found = {name: 1e3 * test["stats"]["median"] for name, test in tests.items()}
        assert {name: row[name] for name in TITLES if name in row} == pytest.approx(found)
        peers = [row[name] for name in ("torch", "onnxruntime") if name in row]
        assert row["ratio"] == pytest.approx(min(peers) / row["fastlstm"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_file_is_skipped_for_one_reason(tmp_path):
    path = tmp_path / "none.json"
    path.touch()
    _, said = suite(path, "gpu")
    assert "1 skipped" in said
    assert "no CUDA GPU that torch can use" in said
