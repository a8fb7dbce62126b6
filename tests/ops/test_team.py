"""The threads that work on a layer together (csrc/cpu/team.h), under the thread sanitizer."""

from pathlib import Path

import pytest
from thread_sanitizer import changed, run_program

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TEAM = ROOT / "csrc/cpu/team.h"


def check(folder, change=None):
    """The exit status and output of the checking program, of team.h with a change of its text."""
    (folder / "cpu").mkdir()
    (folder / "cpu/team.h").write_text(changed(TEAM.read_text(), change))
    return run_program(folder, [HERE / "team_check.cpp"])


def test_every_piece_is_done_once_whenever_threads_come(tmp_path):
    assert check(tmp_path) == (0, "")


BUGS = {
    "a meeting that orders nothing": (
        "__atomic_load_n(&parts_[other].reached[round], __ATOMIC_ACQUIRE) >= meeting",
        "__atomic_load_n(&parts_[other].reached[round], __ATOMIC_RELAXED) >= meeting",
    ),
    "work of others that is not waited for": (
        "__atomic_load_n(&part.helped, __ATOMIC_ACQUIRE) == part.lost", "true",
    ),
    "a thread that joins unannounced": (
        "__atomic_store_n(&admitted_, size, __ATOMIC_RELEASE)",
        "__atomic_store_n(&admitted_, size, __ATOMIC_RELAXED)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", BUGS.values(), ids=BUGS)
def test_planted_bugs_are_seen(change, tmp_path):
    status, output = check(tmp_path, change)
    assert status != 0
    assert "data race" in output or "a piece" in output or "not written" in output
