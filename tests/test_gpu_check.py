"""gpu_check's logic, run on the CPU: the figures themselves need a GPU."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, gpu_check, gpu_checks, gpu_stages, gpu_times, tables, timing
from benchmarks.grid import GPU_CASES, Case
from benchmarks.problems import OPTIONS, Problem
from fastlstm import reference

ROOT = Path(__file__).parents[1]
SMALL = Case("small", 3, 5, 2, 4, 6, bidirectional=True)
LATER = time.monotonic() + 3600
CPU = {"device": "cpu", "algorithms": ["auto"]}


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


def test_mistakes_exit_with_2():
    with pytest.raises(SystemExit) as raised:
        gpu_check.main(["--seconds", "soon"])
    assert raised.value.code == 2


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
    found = gpu_checks.parity(LATER, **CPU, precisions=["fp32"], seeds=2,
                              problems={"plain": {}, "dropout": OPTIONS["dropout"]})  # fmt: skip
    assert [row["problem"] for row in found["rows"]] == ["plain", "dropout"]
    assert "torch_relative" in found["rows"][0]
    assert "torch_relative" not in found["rows"][1]
    assert not found["failed"]
    assert not found["skipped"]


def test_parity_reports_what_is_wrong_refused_or_late(monkeypatch):
    arguments = {**CPU, "precisions": ["fp32"], "seeds": 1, "problems": {"plain": {}}}

    def wrong(*arguments, **options):
        y, h, c = reference.lstm(*arguments, **options)
        return y * 1.01, h, c

    monkeypatch.setattr(accuracy.ops, "lstm", wrong)
    found = gpu_checks.parity(LATER, **arguments)
    assert len(found["failed"]) == 1
    assert "plain, fp32, auto" in found["failed"][0]
    assert found["behind_torch"] == found["rows"]

    def refusing(*arguments, **options):
        raise RuntimeError('the algorithm "persistent" cannot run: no packed sequences')

    monkeypatch.setattr(accuracy.ops, "lstm", refusing)
    found = gpu_checks.parity(LATER, **arguments)
    assert found["rows"][0]["refused"] == "no packed sequences"
    assert not found["failed"]

    def broken(*arguments, **options):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(accuracy.ops, "lstm", broken)
    assert "illegal memory access" in gpu_checks.parity(LATER, **arguments)["failed"][0]
    assert gpu_checks.parity(0.0, **arguments)["skipped"] == ["plain, fp32, auto"]


def test_determinism_and_streams_see_other_bits(monkeypatch):
    assert not gpu_checks.determinism(LATER, **CPU, repeats=2)["failed"]
    assert not gpu_checks.streams(LATER, **CPU, repeats=2)["failed"]
    real = gpu_checks._results
    monkeypatch.setattr(gpu_checks, "_results", lambda x: [y + torch.rand(()) for y in real(x)])
    assert gpu_checks.determinism(LATER, **CPU, repeats=2)["failed"] == [
        "auto: other bits in repeat 0"
    ]
    assert gpu_checks.streams(LATER, **CPU, repeats=2)["failed"] == ["auto: other bits in repeat 0"]


def test_precision_sets_and_restores_the_flags():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for name, allowed in (("tf32", True), ("fp32", False)):
        with accuracy.precision(name) as (dtype, _):
            assert dtype == torch.float32
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


# ---- times ----


def test_benchmark_rows():
    found = gpu_times.benchmark(LATER, **CPU, precisions=["fp32", "bf16"], rounds=3,
                                cases=[SMALL, Case("larger", 16, 256, 1, 16, 2)])  # fmt: skip
    assert [(r["case"], r["precision"], r["training"]) for r in found["rows"]] == [
        ("larger", "fp32", True), ("larger", "fp32", False),
        *[(name, "bf16", training) for name in ("small", "larger") for training in (True, False)],
    ]  # fmt: skip
    for row in found["rows"]:
        assert set(row["milliseconds"]) == {"torch", "fastlstm"}
        assert row["ratio"] == pytest.approx(
            row["milliseconds"]["torch"] / row["milliseconds"]["fastlstm"]
        )
        assert row["algorithm"] == "fused"
    assert found["geometric_means"]["fp32 train"] == pytest.approx(found["rows"][0]["ratio"])
    assert gpu_times.benchmark(0.0, **CPU, precisions=["bf16"], rounds=3, cases=[SMALL]) == {
        "rows": [],
        "geometric_means": {},
        "skipped": ["small, bf16, train", "small, bf16, infer"],
    }


def test_every_target_names_a_case():
    assert set(gpu_times.TARGETS) <= {case.name for case in GPU_CASES}


# ---- the report ----


def test_stages_write_the_report_as_they_end(tmp_path):
    path = tmp_path / "new" / "x.json"
    seen = []

    def first(end):
        seen.append(end - time.monotonic())
        return {"rows": [1], "failed": ["a"], "skipped": ["b"]}

    def second(end):
        assert json.loads(path.read_text())["first"]["rows"] == [1]
        raise ValueError("no such thing")

    def third(end):
        seen.append(end - time.monotonic())
        return {}

    found = gpu_check.run([first, second, third], path, seconds=100)
    assert found == json.loads(path.read_text())
    assert found["failed"] == ["first: a", "second: ValueError: no such thing"]
    assert found["skipped"] == ["first: b"]
    assert 40 < seen[0] <= 50, "half of what is left"
    assert 90 < seen[1] <= 100, "the last stage gets the rest"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"], "no temporary file is left"
    assert {"date", "commit", "torch", "python"} <= set(found)


def test_all_stages_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_times, "GPU_CASES", [SMALL])
    stages = gpu_stages.stages("cpu", quick=True)
    stages[0].keywords["problems"] = {"plain": {}}
    stages[-1].keywords["cases"] = [SMALL]
    found = gpu_check.run(stages, tmp_path / "x.json", 60)
    assert not found["failed"]
    assert set(found["skipped"]) == {
        "graphs: CUDA graphs need a GPU",
        "sanitizer: no compute-sanitizer or no GPU",
    }
    text = gpu_stages.summary(found)
    assert "parity: 2 ran, 0 refused" in text
    assert "failed: 0" in text
    row = next(line for line in text.splitlines() if line.startswith("small  bf16  train"))
    assert "fused" in row
    assert found["ceilings"]["bf16_tflops"] > 0


def test_summary_lists_failures():
    text = gpu_stages.summary({"failed": ["parity: x"], "skipped": []})
    assert text.splitlines()[-2:] == ["failed: 1", "  parity: x"]


def test_file_names():
    name = gpu_check.file_name(
        {"gpu": "NVIDIA H100 80GB HBM3", "commit": "0123456789abcdef", "date": "2026-01-31T00:00"}
    )
    assert name == "h100-80gb-hbm3-0123456789-2026-01-31.json"


def test_table_aligns_columns():
    text = tables.table(["name", "x"], [["a", 1.23456], ["long", 12345.6], ["none", None]])
    assert text.splitlines() == ["name      x", "a      1.23", "long  12346", "none"]
