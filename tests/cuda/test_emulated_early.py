"""Kernels that begin before the kernel before them has ended: what the emulator promises of them.

A chain of small steps has the pattern of stepwise. It is right under every schedule, and every bug
planted before its wait is seen.
"""

from __future__ import annotations

import ctypes as c
import re

import pytest
from simt_checks import NEEDED
from simt_library import ORDERS, load

pytestmark = NEEDED

# In the order of simt/planted_early.cu; what the report must match under every schedule.
EARLY = {
    "no bug": "",
    "no bug, dependents begin before the wait": "",
    "no bug, dependents begin at the end": "",
    "nobody waits": "launched early ends, and none of its threads has waited",
    "one thread of each CTA waits": "on h",
    "read before the wait": "on h",
    "asynchronous copy before the wait": "on h",
    "read of two steps back before the wait": "on h",
    "write before the wait": "on scratch",
    "write before the wait under two steps back": "on scratch",
    "read of what the kernel before the first step writes": "on weights",
    "read of a product before the wait": "on product",
    "write under a product before the wait": "on operand",
}


def run(variant: str, bug: int, order: str, seed: int) -> tuple[int, int, str]:
    """What came out (0: right, 1: wrong, 2: an error), the number of races, and the message."""
    races, message = c.c_int64(), c.create_string_buffer(512)
    outcome = load(variant).simt_planted_early(
        bug, ORDERS.index(order), c.c_uint64(seed), variant == "race", c.byref(races), message
    )
    return outcome, races.value, message.value.decode()


@pytest.mark.parametrize("bug", range(3), ids=list(EARLY)[:3])
@pytest.mark.parametrize("variant", ["plain", "race"])
def test_right_steps_are_right_under_every_schedule(variant, bug):
    for order in ORDERS:
        for seed in range(10):
            assert run(variant, bug, order, seed) == (0, 0, ""), (order, seed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", list(EARLY)[3:])
def test_bug_before_the_wait_is_seen_under_every_schedule(name, order):
    for seed in range(1, 4):
        outcome, races, text = run("race", list(EARLY).index(name), order, seed)
        assert outcome == 2 or races > 0
        assert re.search(EARLY[name], text), text


def test_some_bugs_give_wrong_results_without_the_checker():
    """A missing wait, and a copy that began before it."""
    for name in ("one thread of each CTA waits", "asynchronous copy before the wait"):
        bug = list(EARLY).index(name)
        assert 1 in {run("plain", bug, order, seed)[0] for order in ORDERS for seed in range(20)}


def test_early_kernels_begin_by_ctas_and_wait_for_the_whole_primary():
    began = set()
    for order in ORDERS:
        for seed in range(20):
            at_start, after_wait = (c.c_int * 3)(), (c.c_int * 3)()
            begun = load("plain").simt_early_starts(
                ORDERS.index(order), c.c_uint64(seed), at_start, after_wait
            )
            assert begun == 0
            assert list(after_wait) == [3, 3, 3], "a wait returned before the primary had ended"
            assert min(at_start) >= 0, "a CTA began before the primary allowed it"
            began |= {tuple(at_start)}
    assert (3, 3, 3) in began
    assert any(min(x) == 0 for x in began)
    assert any(min(x) < 3 and max(x) == 3 for x in began), "CTAs begin one by one"
