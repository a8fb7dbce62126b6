"""gpu_check's times and profiles, run on the CPU: their rows, not their figures."""

import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from benchmarks.cases import GPU_CASES, Case
from benchmarks.gpu import profile, report, stages, steps, times
from benchmarks.timing import Samples
from fastlstm.algorithms import Explanation
from fastlstm.ops import algorithm

SMALL = Case("small", 3, 5, 2, 4, 6, bidirectional=True)
CASE = asdict(SMALL)
REFUSAL = 'fastlstm: the algorithm "cluster" cannot run: no packed sequences'


@pytest.mark.parametrize("training", [True, False])
def test_rows_of_times(training):
    (row,) = times.times(CASE, "bf16", training, "cpu", ["auto"], 3)["rows"]
    assert (row["case"], row["precision"], row["training"]) == ("small", "bf16", training)
    assert row["ratio"] == pytest.approx(row["torch"] / row["fastlstm"])
    assert row["step_microseconds"] == pytest.approx(1e3 * row["fastlstm"] / SMALL.steps)
    assert row["algorithm"] == "fused"
    assert row["flattened"] is None
    assert row["graph_ratio"] is None


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_algorithm_that_refuses_a_problem_is_a_row_of_its_own(kind, monkeypatch):
    real = times.prepared

    def prepared(*arguments):
        ready = real(*arguments)

        def call(ours=ready.calls["fastlstm"]):
            if algorithm._forced.get() == "cluster":
                raise kind(text)
            ours()

        ready.calls["fastlstm"] = call
        return ready

    monkeypatch.setattr(times, "prepared", prepared)
    text = REFUSAL
    rows = times.times(CASE, "fp32", True, "cpu", ["stepwise", "cluster"], 3)["rows"]
    assert rows[0]["fastlstm"] > 0
    assert rows[1:] == [
        {"case": "small", "precision": "fp32", "training": True, "algorithm": "cluster",
         "refused": "no packed sequences"}
    ]  # fmt: skip
    text = "illegal memory access"
    with pytest.raises(kind, match=text):
        times.times(CASE, "fp32", True, "cpu", ["cluster"], 3)


def test_graphs_are_timed_beside_eager_calls_and_missing_ones_reported(monkeypatch):
    class Graph:
        def __init__(self, call):
            self.replay = call

    def captured(call):
        call()
        return Graph(call), None

    def bad():
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(times, "captured", captured)
    missing = {}
    found = times._graphs({"torch": bad, "fastlstm": lambda: 5}, missing)
    assert found.keys() == {"fastlstm_graph"}
    assert found["fastlstm_graph"]() == 5
    assert missing == {"torch": "operation not permitted"}

    real = times.timed
    monkeypatch.setattr(times, "timed", lambda *a, **o: with_graphs(real(*a, **o)))

    def with_graphs(found):
        seconds = {"torch": 8.0, "torch_graph": 3.0, "fastlstm": 4.0, "fastlstm_graph": 2.0}
        found.samples = {name: Samples((x,)) for name, x in seconds.items()}
        found.uncaptured = {"torch": "a", "stepwise": "b"}
        return found

    part = times.times(CASE, "bf16", True, "cpu", [], 3)
    (row,) = part["rows"]
    assert (row["ratio"], row["graph_ratio"]) == (2.0, 1.5)
    assert row["step_microseconds"] == pytest.approx(2e6 / SMALL.steps)
    assert part["skipped"] == ["small, bf16, train: no graph of torch: a"]
    assert part["failed"] == ["small, bf16, train: no graph of stepwise: b"]
    assert part["over"], "a new process for the next row"


@pytest.mark.parametrize(
    ("forward", "backward", "forced"),
    [
        ("cluster", "cluster", {"stepwise_graph"}),
        ("cluster", "stepwise", {"stepwise_graph", "cluster_graph"}),
    ],
)
def test_on_a_gpu_other_algorithms_than_the_planners_are_timed_as_graphs(
    forward, backward, forced, monkeypatch
):
    """The way that a GPU takes, with the CPU's tensors, clock and calls in its place."""
    real, here = times.prepared, Explanation("", forward, "", backward, "", 2.0, 3.0)
    monkeypatch.setattr(times, "prepared", lambda c, k, t, _, names: real(c, k, t, "cpu", names))
    monkeypatch.setattr(times, "captured", lambda call: (SimpleNamespace(replay=call), None))
    monkeypatch.setattr(times, "events", times.wall)
    monkeypatch.setattr(times, "peak_memory", lambda call, device: 7)
    monkeypatch.setattr(times.fastlstm, "explain", lambda *arguments: here)
    (row,) = times.times(CASE, "bf16", True, "cuda", ["stepwise", "cluster"], 3)["rows"]
    assert {name for name in row if name.endswith("_graph")} == forced | {
        "torch_graph", "fastlstm_graph",
    }  # fmt: skip
    assert row["graph_ratio"] == pytest.approx(row["torch_graph"] / row["fastlstm_graph"])
    assert (row["torch_peak_bytes"], row["estimated_step_microseconds"]) == (7, 5.0)


def test_half_types_are_held_against_the_best_of_both():
    def row(kind, **times):
        return {"case": "a", "precision": kind, "training": True, **times}

    rows = [
        row("bf16", torch=9.0, torch_graph=4.0, fastlstm_graph=2.0),
        row("fp16", torch=3.0, torch_graph=5.0, fastlstm_graph=6.0),
        row("tf32", torch=1.0, torch_graph=1.0, fastlstm_graph=1.0),
        row("bf16", algorithm="cluster", refused="too large"),
        row("bf16", torch=1.0, fastlstm_graph=1.0) | {"training": False},
    ]
    report.compare(rows)
    assert [r.get("best_ratio") for r in rows] == [1.5, 0.5, None, None, 1.0]
    found = report.means([r | {"ratio": 4.0} for r in rows[:2]])
    assert found == pytest.approx({
        "bf16 train, ratio": 4.0, "bf16 train, best_ratio": 1.5,
        "fp16 train, ratio": 4.0, "fp16 train, best_ratio": 0.5,
    })  # fmt: skip


def test_targets_are_printed_beside_means():
    rows = [{
        "case": "small", "precision": kind, "training": False, "algorithm": "grid",
        "backward_algorithm": "grid", "ratio": 3.0, "graph_ratio": 2.0, "best_ratio": 2.25,
        "eager_ratio": 4.0,
    } for kind in ("bf16", "fp32")]  # fmt: skip
    text = report.summary({"times": {"rows": rows}, "skipped": [], "failed": []})
    for line in (
        "bf16 infer, best_ratio: 2.25, target 2.5", "bf16 infer, eager_ratio: 4.00, target 5.0",
        "bf16 infer, ratio: 3.00", "fp32 infer, graph_ratio: 2.00, target 1.5",
    ):  # fmt: skip
        assert f"geometric mean, {line}\n" in text


def test_a_step_is_the_difference_of_two_calls(monkeypatch):
    """The way that a GPU takes, with the CPU's tensors, and seconds that are made up."""

    def clocks(calls, rounds, clock):
        seconds = {"forward": (1e-3, 2e-6), "both": (3e-3, 5e-6)}
        return {
            name: Samples((once + int(count) * each,))
            for name in calls
            for kind, count in [re.fullmatch(r"(\w+), (\d+) steps", name).groups()]
            for once, each in [seconds[kind]]
        }

    monkeypatch.setattr(steps, "interleaved", clocks)
    monkeypatch.setattr(steps, "captured", lambda call: (SimpleNamespace(replay=call), None))
    monkeypatch.setattr(steps, "STEPS", {"cuda": (2, 5)})
    real = steps.fastlstm.LSTM
    monkeypatch.setattr(
        steps.fastlstm, "LSTM", lambda *sizes, device, dtype: real(*sizes, dtype=dtype)
    )
    (row,) = steps.steps(256, 16, "bf16", "auto", "cuda", 3)["rows"]
    assert row["forward"] == pytest.approx(2)
    assert row["backward"] == pytest.approx(3)
    assert (row["forward_target"], row["backward_target"]) == (0.7, 0.65)
    refused = 'fastlstm: the algorithm "grid" cannot run: too large'
    monkeypatch.setattr(steps, "captured", lambda call: raise_error(RuntimeError(refused)))
    (row,) = steps.steps(256, 16, "fp32", "grid", "cuda", 3)["rows"]
    assert row["refused"] == "too large"


def raise_error(error):
    raise error


def test_every_name_of_a_case_is_one():
    names = {case.name for case in GPU_CASES}
    shown = {*stages.UNTIMED, *stages.QUICK, *stages.PROFILED}
    assert set(times.TARGETS) | shown <= names


def test_profile_has_launches_and_the_longest_kernels():
    rows = profile.profile(CASE, "fp32", "cpu")["rows"]
    assert [row["backend"] for row in rows] == ["fastlstm", "torch"]
    for row in rows:
        kernels = row["kernels"]
        assert row["launches"] >= len(kernels) > 0
        assert row["milliseconds"] >= sum(k["microseconds"] for k in kernels) / 1e3 * 0.999
        times = [kernel["microseconds"] for kernel in kernels]
        assert times == sorted(times, reverse=True)
    assert any("fastlstm" in kernel["name"] for kernel in rows[0]["kernels"])
    assert any("lstm" in kernel["name"] for kernel in rows[1]["kernels"])
