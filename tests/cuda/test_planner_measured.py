"""The planner's estimates against what kernels took on a GPU: benchmarks/results/steps."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.measured import RESULTS
from fastlstm import _C
from fastlstm.algorithms import GPUS

FILES = sorted((RESULTS / "steps").glob("*.json"))
DTYPES = {"tf32": 0, "bf16": 2, "f16": 3}


def rows():
    return [row for path in FILES for row in json.loads(path.read_text())["rows"]]


def chosen(row):
    """The plan for a row's problem, on the GPU that it ran on."""
    capability, sms, shared = GPUS["H200"]
    return _C.plan(
        dtype=DTYPES[row["precision"]], steps=row["steps"], batch=row["batch"], packed=False,
        hidden_size=row["hidden_size"], proj_size=0, layers=1,
        directions=row.get("directions", 1), backward=row["direction"] == "backward",
        capability=capability, sms=sms, shared_per_block=shared, algorithm=0, allow_tf32=True,
    )  # fmt: skip


def is_of(row, plan):
    """Whether a row measured just what that plan runs."""
    same = ("algorithm", "units", "sequences")
    return all(row[name] == plan.get(name) for name in same)


def test_measurements_are_of_the_gpu_that_estimates_are_for():
    assert FILES
    for path in FILES:
        assert json.loads(path.read_text())["gpu"] == "NVIDIA H200"


def test_an_estimate_is_within_one_and_a_half_times_what_was_measured():
    compared = [(row, plan["microseconds"]) for row in rows() if is_of(row, plan := chosen(row))]
    assert len(compared) >= 20
    for row, estimate in compared:
        assert 1 / 1.5 <= estimate / row["microseconds"] <= 1.5, (row, estimate)


def test_the_planner_never_picks_what_was_measured_to_lose():
    by_problem = defaultdict(list)
    sizes = ("precision", "hidden_size", "batch", "steps", "direction", "directions")
    for row in rows():
        by_problem[tuple(row.get(name, 1) for name in sizes)].append(row)
    several = [measured for measured in by_problem.values() if len(measured) > 1]
    assert several
    for measured in several:
        best = min(row["microseconds"] for row in measured)
        for row in measured:
            if is_of(row, chosen(row)):
                assert row["microseconds"] <= 1.1 * best, row


@pytest.mark.parametrize("path", FILES, ids=lambda path: Path(path).stem)
def test_what_was_measured_was_right(path):
    """Every row: close to float64, and the same bits in two whole runs."""
    limits = {"bf16": 6e-3, "f16": 2e-3, "tf32": 2e-3}
    for row in json.loads(path.read_text())["rows"]:
        errors = [value for name, value in row.items() if name.startswith("relative_error")]
        assert max(errors) < limits[row["precision"]], row
        assert row["differing_words"] == 0
