"""gpu_check's logic, run on the CPU: the figures themselves need a GPU."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, gpu_check, tables, timing
from benchmarks.cases import GPU_CASES, Case
from benchmarks.gpu import checks, report, stages, tools
from benchmarks.problems import OPTIONS, Problem
from fastlstm import reference

ROOT = Path(__file__).parents[2]
SMALL = Case("small", 3, 5, 2, 4, 6, bidirectional=True)
CPU = {"algorithm": "auto", "device": "cpu"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_3(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 3
    assert found.stderr.splitlines() == [
        "gpu_check: no CUDA GPU that torch can use; nothing was checked"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seconds", "soon"], "invalid float value: 'soon'"),
        (["--only", "parity,speed"], "expected some of parity, dropin, sanitizer, determinism, "
         "streams, graphs, ceilings, steps, times, text, profile, with commas between, "
         "got 'speed'"),
    ],
)  # fmt: skip
def test_mistakes_exit_with_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as raised:
        gpu_check.main(arguments)
    assert raised.value.code == 2
    assert text in capsys.readouterr().err


# ---- statistics ----


def test_interleaved_runs_candidates_in_turn():
    order = []
    ticks = {"a": iter([9.0, 1.0, 5.0, 3.0, 4.0]), "b": iter([9.0, 1.0, 2.0, 2.0, 8.0])}

    def clock(call, calls):
        call()
        return next(ticks[order[-1]])

    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = timing.interleaved(calls, rounds=3, clock=clock, budget=100.0)
    assert "".join(order) == "aabb" + "ababab"
    assert (found["a"].median, found["b"].median) == (4.0, 2.0)


def test_interleaved_repeats_short_calls():
    repeats = []

    def clock(call, calls):
        repeats.append(calls)
        return 0.001 * calls

    timing.interleaved({"a": lambda: None}, rounds=2, clock=clock, region=0.05)
    assert repeats == [1, 1, 50, 50]


def test_interleaved_runs_short_calls_twice_after_a_pause():
    calls = []

    def clock(call, number):
        calls.append(call())
        return {"short": 0.001, "long": 0.02}[calls[-1]]

    candidates = {"short": lambda: "short", "long": lambda: "long"}
    timing.interleaved(candidates, rounds=1, clock=clock, region=0.0, pause=0.01)
    assert calls[4:] == ["short", "short", "long"]


def test_interleaved_keeps_to_its_budget():
    times = {"slow": 1.0, "very slow": 9.0}
    called = []

    def clock(call, calls):
        call()
        return times[called[-1]] * calls

    calls = {name: (lambda name=name: called.append(name)) for name in times}
    found = timing.interleaved(calls, rounds=7, clock=clock, budget=5.0)
    assert {name: len(s.seconds) for name, s in found.items()} == {"slow": 5, "very slow": 1}


def test_spread_and_geometric_mean():
    assert timing.Samples((1.0, 1.0, 1.0, 1.0)).spread == 0
    assert timing.Samples((1.0, 3.0)).spread == 0.5
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(timing.geometric_mean([]))


def test_wall_measures_a_call():
    assert 0.009 < timing.wall(lambda: time.sleep(0.01), 2) < 1


def test_flops_of_the_products():
    layer_one, layer_two = 4 * 5 * (3 + 5), 4 * 5 * (10 + 5)
    assert SMALL.flops(False) == 2 * (layer_one + layer_two) * 2 * 6 * 4
    assert SMALL.flops(True) == 3 * SMALL.flops(False)


# ---- parity ----


def test_distance_finds_the_worst_and_nan():
    exact = ([torch.ones(4).double()], [torch.ones(4).double(), torch.ones(4).double()])
    found = ([torch.ones(4)], [torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.1])])
    worst = accuracy.distance(found, exact)
    assert worst.where == "gradient 1"
    assert worst.relative == pytest.approx(0.05, rel=1e-3)
    assert worst.largest == pytest.approx(0.1, rel=1e-3)
    found[0][0][2] = torch.nan
    worst = accuracy.distance(found, exact)
    assert math.isnan(worst.relative)
    assert worst.where == "output 0"


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "name", ["plain", "packed", "projection", "index", "no bias", "zero states"]
)
def test_torchs_lstm_is_as_close_as_its_type(name):
    problem = Problem(dtype=torch.float32, **OPTIONS[name])
    candidates = accuracy.candidates_for(problem)
    found = accuracy.distances(problem, 2, torch.device("cpu"), candidates, "fp32")
    assert set(found) == {"fastlstm", "torch"}
    assert all(0 < d.relative < 5e-6 for d in found.values())


def test_parity_rows():
    for problem, beside in {"plain": True, "dropout": False}.items():
        found = checks.parity(problem, "fp32", **CPU, seeds=2)
        (row,) = found["rows"]
        assert (row["problem"], row["precision"], row["algorithm"]) == (problem, "fp32", "auto")
        assert 0 < row["relative"] < 5e-6
        assert ("torch_relative" in row) is beside
        assert not found["failed"]


def test_parity_reports_what_is_wrong(monkeypatch):
    def wrong(*arguments, **options):
        y, h, c = reference.lstm(*arguments, **options)
        return y * 1.01, h, c

    monkeypatch.setattr(accuracy.ops, "lstm", wrong)
    found = checks.parity("plain", "fp32", **CPU, seeds=1)
    (failed,) = found["failed"]
    assert failed.startswith("plain, fp32, auto: ")
    assert " is off by " in failed
    text = report.summary({"parity": {"rows": found["rows"]}, "failed": [failed], "skipped": []})
    assert "parity: 1 ran, 0 refused, 1 more than 1.5 times as far from float64 as torch" in text


REFUSAL = 'fastlstm: the algorithm "cluster" cannot run: no packed sequences'


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_refusal_is_a_row_and_any_other_error_is_raised(kind, monkeypatch):
    def raising(*arguments, **options):
        raise kind(text)

    monkeypatch.setattr(accuracy.ops, "lstm", raising)
    text = REFUSAL
    found = checks.parity("plain", "fp32", **CPU, seeds=1)
    assert found["rows"][0]["refused"] == "no packed sequences"
    assert not found.get("failed")
    text = "illegal memory access"
    with pytest.raises(kind, match=text):
        checks.parity("plain", "fp32", **CPU, seeds=1)


def test_determinism_and_streams_see_other_bits(monkeypatch):
    assert not checks.determinism(**CPU, repeats=2)["failed"]
    assert not checks.streams(**CPU, repeats=2)["failed"]
    real = checks.results
    monkeypatch.setattr(checks, "results", lambda x: [y + torch.rand(()) for y in real(x)])
    other = ["auto: other bits in repeat 0"]
    assert checks.determinism(**CPU, repeats=2)["failed"] == other
    assert checks.streams(**CPU, repeats=2)["failed"] == other


def test_precision_sets_and_restores_the_flags():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for name, allowed in (("tf32", True), ("fp32", False)):
        with accuracy.precision(name) as (dtype, _):
            assert dtype == torch.float32
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


# ---- other programs ----


@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        ("exit 0", None, None),
        ("echo ===== COMPUTE; echo ===== Invalid read; exit 9", "failed", "Invalid read"),
        ("echo device not supported; exit 1", "skipped", "device not supported"),
        ("sleep 60", "skipped", "not done in 2 s"),
        ('shift 4; exec "$@"', "failed", "memcheck, auto: "),  # there is no GPU
    ],
)
def test_what_the_sanitizer_says(script, kind, text, tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(tools, "sanitizer_program", lambda: str(program))
    seconds = 2 if "sleep" in script else 60
    if "exec" in script and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = tools.sanitizer("memcheck", "auto", seconds)
    for other in ("failed", "skipped"):
        assert bool(found.get(other)) is (other == kind)
    if kind:
        assert text in found[kind][0]


def test_what_runs_under_the_sanitizer_runs():
    assert tools.small("auto", "cpu") == {}


TESTS = """
import os, time, pytest
pytestmark = pytest.mark.cuda
def test_right(): pass
def test_wrong(): assert False
@pytest.mark.parametrize("x", ["a b"])
def test_missing(x, no_such_fixture): pass
@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.fixture
def cuda_tests(tmp_path):
    """Make a file of tests from its text, in a project that knows the marker."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda: a GPU\naddopts = -q\n")

    def make(text):
        path = tmp_path / "test_x.py"
        path.write_text(text)
        return path

    return make


def test_dropin_names_the_tests_that_fail(cuda_tests):
    found = tools.dropin(str(cuda_tests(TESTS)), 60)
    assert found["rows"] == [{"file": "test_x.py", "ran": 3, "skipped": 1, "failed": 2}]
    assert [name.split("::")[1] for name in found["failed"]] == ["test_wrong", "test_missing[a b]"]


@pytest.mark.parametrize(
    ("line", "seconds", "how"),
    [("time.sleep(60)", 8, "not done in 8 s"), ("os._exit(4)", 60, "exit status 4")],
)
def test_dropin_names_the_test_that_ended_it(line, seconds, how, cuda_tests):
    found = tools.dropin(str(cuda_tests(f"{TESTS}def test_last(): {line}\n")), seconds)
    assert found["failed"][2].startswith(f"test_x.py: {how}, ")
    assert found["failed"][2].endswith("::test_last was running")


def test_dropin_without_a_marked_test_fails_nothing(cuda_tests):
    found = tools.dropin(str(cuda_tests("def test_other(): assert False\n")), 60)
    assert found == {
        "rows": [{"file": "test_x.py", "ran": 0, "skipped": 0, "failed": 0}], "failed": [],
    }  # fmt: skip


# ---- the report ----


def test_the_report_is_written_with_every_answer(tmp_path):
    path = tmp_path / "new" / "x.json"
    written = report.Report(path, {"date": "a day"})
    written.take("parity", {"rows": [{"problem": 1}], "seconds": 1.5})
    assert json.loads(path.read_text())["parity"] == {"rows": [{"problem": 1}], "seconds": 1.5}
    written.take("parity", {"rows": [{"problem": 2}], "failed": ["a"], "seconds": 2.0})
    written.take("ceilings", {"copy": 3.0, "skipped": ["b"]})
    assert json.loads(path.read_text()) == {
        "date": "a day",
        "failed": ["parity: a"],
        "skipped": ["ceilings: b"],
        "parity": {"rows": [{"problem": 1}, {"problem": 2}], "seconds": 3.5},
        "ceilings": {"copy": 3.0, "seconds": 0.0},
    }
    assert path.with_suffix(".txt").read_text().endswith("failed: 1\n  parity: a\n")
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.json", "x.txt"], "no temporary file"


def test_all_stages_on_the_cpu(tmp_path, monkeypatch, cuda_tests, capsys):
    monkeypatch.setattr(tools, "cuda_tests", lambda: [cuda_tests(TESTS)])
    monkeypatch.setattr(stages, "PROFILED", ("small",))
    path = tmp_path / "x.json"
    found = gpu_check.check(
        gpu_check.STAGES, "cpu", True, path, 120, cases=[SMALL], problems=["plain"]
    )
    assert found == json.loads(path.read_text())
    assert {"date", "commit", "torch", "python", "seconds"} <= set(found)
    assert [x.split("::")[1] for x in found["failed"]] == ["test_wrong", "test_missing[a b]"]
    assert set(found["skipped"]) == {
        "graphs: CUDA graphs need a GPU",
        "sanitizer: memcheck, auto: no compute-sanitizer or no GPU",
    }
    assert "profile: " in capsys.readouterr().out
    text = path.with_suffix(".txt").read_text()
    assert "parity: 2 ran, 0 refused" in text
    assert "test_x.py: 3 ran, 2 failed, 1 skipped" in text
    said = text.split("small, bf16, a training call of torch: ")[1].splitlines()
    assert all(re.match(r" +[\d.]+ us in \d+: \S", line) for line in said[1:4])
    row = next(line for line in text.splitlines() if line.startswith("small  bf16  train"))
    assert "fused" in row
    assert found["ceilings"]["bf16_tflops"] > 0
    (step,) = found["steps"]["rows"]
    assert (step["hidden_size"], step["batch"], step["algorithm"]) == (64, 128, "auto")
    # Differences of times: on a busy machine of either sign.
    assert math.isfinite(step["forward"] + step["backward"])
    assert "H64 B128  bf16  auto" in text
    assert [row["rows_like_the_cpus"] for row in found["text"]["rows"]] == [1, 1]
    assert "text, 2 layers, fp32, batch 64: " in text


def test_only_some_stages_run(tmp_path):
    found = gpu_check.check(["determinism"], "cpu", True, tmp_path / "x.json", 60)
    assert found["determinism"]["rows"] == [{"algorithm": "auto", "repeats": 3}]
    assert not set(found) & set(gpu_check.STAGES) - {"determinism"}
    assert gpu_check.stages_of("times, profile") == ["times", "profile"]


def test_a_stage_with_nothing_to_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "cuda_tests", list)
    found = gpu_check.check(["dropin"], "cpu", True, tmp_path / "x.json", 60)
    assert found["skipped"] == ["dropin: there is nothing to run"]


def test_on_a_gpu_every_type_has_a_process_and_what_is_timed_runs_alone():
    made = stages.groups(["parity"], "cuda", False)
    assert [len(group.tasks) for group in made] == [3 * len(checks.PROBLEMS)] * 5
    quick, whole = (stages.groups(["times"], "cuda", x) for x in (True, False))
    assert [len(group.tasks) for group in quick] == [4] * len(stages.QUICK)
    assert [len(group.tasks) for group in whole] == [8] * (len(GPU_CASES) - len(stages.UNTIMED))


def test_file_names():
    name = gpu_check.file_name(
        {"gpu": "NVIDIA H100 80GB HBM3", "commit": "0123456789abcdef", "date": "2026-01-31T00:00"}
    )
    assert name == "h100-80gb-hbm3-0123456789-2026-01-31.json"


def test_table_aligns_columns():
    text = tables.table(["name", "x"], [["a", 1.23456], ["long", 12345.6], ["none", None]])
    assert text.splitlines() == ["name      x", "a      1.23", "long  12346", "none"]
