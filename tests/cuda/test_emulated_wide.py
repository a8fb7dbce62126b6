"""Wide steps, csrc/cuda/stepwise/wide_step.cuh, run by the emulator: h is shared by multicast.

A schedule names one of their three tiles, and how many CTAs form a cluster.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, sanitize
from simt_library import ORDERS, Emulated, Schedule, load, plan

from benchmarks.problems import OPTIONS, Problem, make

pytestmark = NEEDED

BF16 = torch.bfloat16
FIRST, TILES = 4, range(4, 7)  # kWideTile and those behind it: of 32, 64 and 128 sequences
# Options beside a projection, which wide steps do not have; H is a multiple of 8.
NAMES = {
    name: TILES[j % 3]
    for j, name in enumerate(name for name, x in OPTIONS.items() if "proj_size" not in x)
}
SIZES = {
    "one unit group, one step": (4, 2, Problem(hidden_size=8, batch=1, steps=1)),
    "units end inside a CTA": (5, 3, Problem(hidden_size=24, batch=3, steps=2)),
    "K ends inside a stage": (6, 2, Problem(hidden_size=136, batch=3, steps=3)),
    "sequences end inside a tile": (6, 2, Problem(hidden_size=24, batch=129, steps=2)),
    "groups end one after the other": (
        4,
        3,
        Problem(hidden_size=40, batch=70, steps=3, packed=True, bidirectional=True),
    ),
    "the ring is filled again": (4, 4, Problem(hidden_size=536, batch=2, steps=2)),
}


@pytest.mark.parametrize("name", NAMES)
def test_wide_steps_match_the_reference(name):
    p = Problem(**OPTIONS[name] | {"dtype": BF16, "hidden_size": 40})
    assert_matches(p, Schedule("random", tile=NAMES[name], ctas=2))


@pytest.mark.parametrize("name", SIZES)
def test_wide_steps_of_every_size(name):
    tile, ctas, p = SIZES[name]
    assert_matches(replace(p, dtype=BF16, input_size=3), Schedule("random", tile=tile, ctas=ctas))


@pytest.mark.parametrize("tile", TILES)
def test_wide_steps_in_half_precision(tile):
    p = Problem(hidden_size=40, batch=3, steps=3, dtype=torch.float16)
    assert_matches(p, Schedule("random", tile=tile, ctas=2))


def test_results_depend_on_neither_the_cluster_nor_the_schedule():
    small = {"dtype": BF16, "hidden_size": 40, "batch": 4, "num_layers": 1}
    p = Problem(**OPTIONS["packed, both directions"] | small)
    for tile in TILES:
        runs = [
            assert_matches(p, Schedule(order, seed, tile=tile, ctas=ctas))
            for seed, (order, ctas) in enumerate(zip(ORDERS, (1, 2, 3, 4, 0, 2), strict=True))
        ]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_wide_step_is_one_launch_without_a_product():
    p = Problem(hidden_size=40, batch=3, steps=1, states=False, dtype=BF16)
    x = make(p)

    def run(steps: int) -> Emulated:
        emulated = Emulated(load("plain"), Schedule(tile=FIRST, ctas=2))
        with torch.no_grad():
            emulated.lstm(x.input.repeat(steps, 1, 1), *x.arguments[1:])
        return emulated

    few, many = run(2), run(9)
    assert many.launches - few.launches == 7
    assert many.products == few.products


def test_planner_takes_wide_steps_where_l2_bounds_a_large_half_type():
    """And on GPUs with clusters alone. docs/kernels.md has these numbers."""

    def gates(dtype: torch.dtype, hidden: int, batch: int, capability: int = 90) -> int:
        return plan(
            load("plain"), dtype, hidden, batch, capability=capability, algorithm="stepwise"
        ).cell_tile

    assert gates(BF16, 2048, 128) == FIRST + 2
    assert gates(torch.float16, 4096, 32) == FIRST
    assert gates(BF16, 4096, 64) == FIRST + 1
    for other in (
        gates(BF16, 256, 16),
        gates(BF16, 2048, 128, 80),
        gates(BF16, 2050, 128),
        gates(torch.float32, 2048, 128),
    ):
        assert other < FIRST


@pytest.mark.parametrize("name", ["every rule", "zero states"])
def test_no_races(name):
    p = Problem(**OPTIONS[name] | {"dtype": BF16, "hidden_size": 24, "steps": 3, "batch": 5})
    for ctas, (order, tile) in enumerate([("random", 4), ("block_down", 6)], 2):
        assert_matches(p, Schedule(order, races=True, tile=tile, ctas=ctas), "race")


def test_address_sanitizer_finds_nothing():
    sanitize(
        "p = Problem(**OPTIONS['every rule'] | {'dtype': torch.bfloat16, 'hidden_size': 24,\n"
        "                                      'steps': 2})\n"
        "for tile in range(4, 7):\n"
        "  assert_matches(p, Schedule('random', tile=tile, ctas=2), 'asan')\n"
        "  print('right:', tile)\n",
        right=3,
    )


# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
STEP = "stepwise/wide_step.cuh"
WAIT = "wait_for_primary();\n  start_dependents();\n  if (cta.copies()) cta.begin_hidden();\n"
MUTANTS = {
    "empty slot not awaited": (STEP, "wait(empty(slot), emptied_parity_, args_.limit);", ""),
    "a CTA left out of the multicast": (STEP, "(1u << ctas) - 1", "(1u << (ctas - 1)) - 1"),
    "states loaded before the wait": (
        STEP,
        WAIT + "  cta.load_states();",
        "cta.load_states();\n  " + WAIT,
    ),
    "sums over operands in use": (
        STEP,
        "__syncthreads();",
        "",
        "__syncthreads();  // all have read the operands",
    ),
}
ONLY = [
    ("stepwise/step_launcher.cuh", "run_kernel(step_kernel<Shape, Step>", "kIndex == 0"),
    ("stepwise/wide_launch.cuh", "launcher.run_clusters(wide_step_kernel<Shape>", "kIndex == 0"),
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return plant(MUTANTS, folder, kinds="stepwise", only=ONLY)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_in_the_kernel_is_seen(name, mutants):
    small = Problem(hidden_size=24, batch=2, steps=3, input_size=3, num_layers=2, dtype=BF16)
    refilled = Problem(hidden_size=536, batch=1, steps=1, input_size=1, dtype=BF16)
    schedule = Schedule("random", races=True, tile=FIRST, ctas=2)
    found = is_seen(mutants[name], "simt_checks", "shows", [small, refilled], [schedule])
    assert found == (name != NO_BUG)
