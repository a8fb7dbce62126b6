"""gpu_check's processes: what dies, hangs or comes too late costs itself alone."""

import os
import sys
import time
from pathlib import Path

import gpu_check_tasks as does
import pytest

from benchmarks.gpu import processes
from benchmarks.gpu.processes import Group, Task, run

# The worker with nothing in torch's place and that of its checks: importing them takes most of its
# time, and these tests call none. test_gpu_check.py runs the whole one.
WITHOUT_TORCH = """
import sys
from unittest.mock import MagicMock
checks = ["benchmarks.gpu." + name for name in ("checks", "profile", "times", "tools")]
sys.modules.update({name: MagicMock() for name in ("torch", *checks)})
from benchmarks.gpu.worker import main
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def _quick_worker(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(processes, "COMMAND", [sys.executable, "-c", WITHOUT_TORCH])


def answered(*groups, at_once=1, seconds=100.0):
    """The parts of every stage, in the order of their answers."""
    found = []
    run(groups, at_once, time.monotonic() + seconds, lambda *x: found.append(x))
    return found


def value(n):
    return Task(f"value {n}", does.answer, {"value": n})


def values(found):
    return [row["value"] for row in rows(found)]


def rows(found):
    """Of group after group; which of two begins is a matter of whose process loads first."""
    return [row for _, part in sorted(found, key=lambda x: x[0]) for row in part.get("rows", [])]


def failures(found):
    return [text for _, part in found for text in part.get("failed", [])]


def test_a_group_shares_a_process_and_no_two_groups_do():
    found = answered(Group("a", (value(1), value(2))), Group("b", (value(3),)))
    assert values(found) == [1, 2, 3]
    first, second, other = (row["process"] for row in rows(found))
    assert first == second
    assert len({first, other, os.getpid()}) == 3
    assert all(part["seconds"] >= 0 for _, part in found)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Task("it", does.abort), "it: ended by SIGABRT"),
        (Task("it", does.leave, {"status": 3}), "it: exit status 3"),
        (Task("it", does.sleep, {"seconds": 60}, seconds=0.5), "it: no answer in 0 s"),
        (Task("it", does.fail, {"text": "no such thing\nhere"}), "it: ValueError: no such thing"),
        (Task("it", does.answer, {"values": 1}), "it: TypeError: answer() got an unexpected"),
    ],
)
def test_what_kills_its_process_costs_one_task(task, text):
    found = answered(Group("a", (value(1), task, value(2))))
    assert values(found) == [1, 2]
    (said,) = failures(found)
    assert said.startswith(text)
    before, after = (row["process"] for row in rows(found))
    assert before != after, "CUDA may be of no use to a process that failed"


def test_a_failure_has_the_last_words_on_stderr():
    (said,) = failures(answered(Group("a", (Task("it", does.abort),))))
    assert "| first words | last words" in said


def test_groups_run_side_by_side():
    nap = Task("nap", does.sleep, {"seconds": 2.0})
    start = time.monotonic()
    assert not failures(answered(*[Group("a", (nap, nap, nap))] * 3, at_once=3))
    assert time.monotonic() - start < 18, "one after the other they take that long by themselves"


def test_what_the_end_comes_before_is_skipped(monkeypatch):
    found = answered(Group("a", (value(1), value(2))), seconds=-1)
    assert found == [("a", {"skipped": ["value 1: no time left", "value 2: no time left"]})]
    monkeypatch.setattr(processes, "GRACE", 0.0)
    long = Task("long", does.sleep, {"seconds": 600}, seconds=1000)
    found = answered(Group("a", (value(1), long, value(2))), seconds=15)
    assert values(found) == [1]
    assert found[1:] == [("a", {"skipped": ["long: no time left", "value 2: no time left"]})]


def test_a_process_that_does_not_start_fails_its_group_once(monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", ["sh", "-c", "echo no torch >&2; exit 5"])
    found = answered(Group("a", (value(1), value(2))), Group("b", (value(3),)))
    assert sorted(failures(found)) == [
        "value 1 and 1 more: no start, exit status 5 | no torch",
        "value 3 and 0 more: no start, exit status 5 | no torch",
    ]
