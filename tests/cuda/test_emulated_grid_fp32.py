"""The grid kernels in full fp32, by multiply-adds, run by the emulator.

What they share with those of tensor cores is tested in test_emulated_grid.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, problems_of, sanitize
from simt_library import ORDERS, Emulated, KernelError, Schedule, load, plan
from test_emulated_grid import GRID

from benchmarks.problems import TOLERANCE, Problem, make

pytestmark = NEEDED

SHAPES = range(2)


def grid(order="random", **more):
    return Schedule(order, algorithm="grid", **more)


@pytest.mark.parametrize("name", GRID)
def test_fp32_grid_kernels_match_the_reference(name):
    assert_matches(Problem(**GRID[name]), grid())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("hidden", "batch", "steps"),
    [(1, 1, 1), (1, 9, 2), (3, 17, 1), (7, 33, 3), (64, 8, 2), (65, 5, 3), (129, 3, 2)],
)
def test_odd_sizes_in_fp32(hidden, batch, steps, shape):
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, bidirectional=hidden < 64)
    assert_matches(p, grid(shape=shape))


@pytest.mark.parametrize(("hidden", "shape"), [(266, 0), (530, 1), (772, 0)])
def test_fp32_weights_in_registers_and_in_shared_memory(hidden, shape):
    """Several slabs and blocks a warp, of which the last is not full."""
    p = Problem(hidden_size=hidden, batch=2, steps=3, packed=True)
    assert_matches(p, grid(shape=shape))


@pytest.mark.parametrize("active", [1, 3])
def test_batch_and_directions_that_one_launch_does_not_hold(active):
    p = Problem(hidden_size=40, num_layers=2, batch=29, bidirectional=True, packed=True)
    assert_matches(p, grid(shape=0, active=active))


def test_h_keeps_its_whole_mantissa():
    """But for the bit that carries the phase: as close to float64 as float32, which tf32 is not."""
    p = Problem(hidden_size=60, batch=5, steps=5)
    assert_matches(p, grid(), tolerance=2e-6)
    with pytest.raises(AssertionError, match="relative error"):
        assert_matches(p, grid(allow_tf32=True), tolerance=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_first_states_may_be_of_any_size_in_fp32(packed):
    """The exchange need not carry them; backwards in time, sequences enter late."""
    p = Problem(hidden_size=40, batch=19, steps=6, bidirectional=True, packed=packed)
    x = make(p)
    with torch.no_grad():
        x.h0.mul_(50)
    found = Emulated(load("plain"), grid(shape=1)).lstm(*x.arguments)
    same = Emulated(load("plain"), Schedule()).lstm(*x.arguments)
    for a, b in zip(found, same, strict=True):
        assert (a.double() - b.double()).norm() < 1e-5 * b.double().norm()


def test_an_h0_that_zoneout_keeps_may_be_of_any_size():
    p = Problem(batch=9, steps=9, zoneout_h=0.4, zoneout_c=0.3, num_layers=2, packed=True)
    assert_matches(p, grid())


@pytest.mark.parametrize("order", ["random", "block_down"])
def test_nan_stays_in_its_sequence_in_fp32(order):
    p = Problem(hidden_size=70, batch=11, steps=7)
    x = make(p)
    clean = Emulated(load("plain"), grid(order)).lstm(*x.arguments)[0].detach()
    with torch.no_grad():
        x.input[2, 4, 0] = torch.nan
    y = Emulated(load("plain"), grid(order)).lstm(*x.arguments)[0]
    expected = torch.zeros(p.steps, p.batch, dtype=torch.bool)
    expected[2:, 4] = True
    assert torch.equal(y.isnan().all(-1), expected)
    assert torch.equal(y.isnan().any(-1), expected)
    assert torch.equal(y[~expected].detach(), clean[~expected])


def test_fp32_results_do_not_depend_on_the_schedule():
    p = Problem(
        hidden_size=70, num_layers=2, batch=20, steps=4, dropout=0.4, packed=True,
        bidirectional=True,
    )  # fmt: skip
    runs = [assert_matches(p, grid(order, seed=seed)) for seed, order in enumerate(ORDERS)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_groups_of_either_size_give_the_same_outputs_in_fp32():
    """To the bit: not gradients, for the phase is a bit of their sums."""
    x = make(Problem(hidden_size=70, batch=16, steps=5, packed=True, bidirectional=True))
    eight, sixteen = (
        Emulated(load("plain"), grid(shape=shape)).lstm(*x.arguments) for shape in SHAPES
    )
    assert all(torch.equal(a, b) for a, b in zip(eight, sixteen, strict=True))


@settings(max_examples=10, deadline=None)
@given(problems_of(), st.sampled_from(ORDERS), st.integers(-1, 1), st.integers(0, 2))
def test_drawn_problems_run_over_the_grid_in_fp32(p, order, shape, active):
    p = replace(p, proj_size=0)
    schedule = grid(order, seed=p.random_seed, shape=shape, active=active)
    assert_matches(p, schedule, tolerance=2 * TOLERANCE[p.dtype])


def test_float64_is_refused():
    with pytest.raises(KernelError, match="the grid's kernels have no float64"):
        assert_matches(Problem(dtype=torch.float64), grid())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("hidden", "batch", "capability"),
    [(768, 16, 90), (1024, 64, 90), (256, 16, 80), (512, 64, 80), (1000, 1, 80)],
)
def test_planner_takes_the_grid_for_fp32_where_no_cluster_runs(hidden, batch, capability, backward):
    found, stepwise = (
        plan(load("plain"), torch.float32, hidden, batch, capability, backward, algorithm=algorithm)
        for algorithm in ("auto", "stepwise")
    )
    assert (found.algorithm, found.tensor_cores) == (3, False)
    assert found.microseconds < stepwise.microseconds


# ---- the race checker and the address sanitizer ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preempt", [0, 50])
def test_no_races_in_fp32_grid_kernels(preempt, shape):
    p = Problem(hidden_size=40, batch=18, steps=5, bidirectional=True)
    for order, packed in (("random", True), ("block_down", False)):
        schedule = grid(order, races=True, preempt=preempt, shape=shape)
        assert_matches(replace(p, packed=packed), schedule, "race")


def test_no_races_with_several_slabs_a_warp():
    p = Problem(hidden_size=330, batch=9, steps=3)
    assert_matches(p, grid(races=True, preempt=50, shape=1), "race")


def test_address_sanitizer_finds_nothing_in_the_fp32_grid():
    sanitize(
        "from test_emulated_grid_fp32 import grid\n"
        "for shape in range(2):\n"
        "  p = Problem(hidden_size=40 if shape else 33, batch=10, packed=True, cells=True,\n"
        "              bidirectional=True)\n"
        "  assert_matches(p, grid(shape=shape), 'asan')\n"
        "  print('right:', shape)\n",
        right=2,
    )


# ---- planted bugs ----

_FORWARD, _BACKWARD = "grid/forward_fp32.cuh", "grid/backward_fp32.cuh"
# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "h not waited for": (
        _FORWARD, "__any_sync(~0u, waits(packet) != 0)", "false",
        "if (__any_sync(~0u, waits(packet) != 0)) {",
    ),
    "slab read before it is there": (
        _FORWARD, "__syncwarp();", "", "__syncwarp();\n      multiply_slab(",
    ),
    "one slab in shared memory": (_FORWARD, "k % kGrid.staged_slabs", "0"),
    "slab overwritten by the next tile": (_FORWARD, "__syncwarp();", "", "__syncwarp();  // all"),
    "every lane reads the first piece": (
        _FORWARD, "lane_of_thread() % 4 * 16", "0", "staged + lane_of_thread() % 4 * 16",
    ),
    "sums handed over too early": (
        "grid/forward.cuh", "__syncthreads();", "",
        "partial.begin(sums, initial);\n      __syncthreads();",
    ),
    "first tile handed over twice": (_FORWARD, "(m * kTiles + tile)", "(m * kTiles)"),
    "late sequences begin from nothing": (_FORWARD, "late.begin >= late.end", "true"),
    "every lane multiplies the first unit": (
        _BACKWARD, "lane_of_thread() % 4 * 16", "0", "return lane_of_thread() % 4 * 16",
    ),
    "both blocks take the weights of the first": (
        _BACKWARD, "(first + m) * kSlabs", "first * kSlabs",
    ),
    "first tile of dgates taken twice": (_BACKWARD, "tile * (kSlabs * kLayout.tile_bytes)", "0"),
    "sums of a lane not ordered": (_BACKWARD, "order_halves<4 * kCount * 4>(sums, 1);", ""),
}  # fmt: skip
ONLY = [
    ("grid/forward_pass.cuh", "run_steps<index.value>", "index.value == 1"),
    ("grid/backward_pass.cuh", "launch_cooperative(grid_backward_kernel", "kBlocks <= 2"),
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return plant(MUTANTS, folder, types="f32", kinds="grid_forward grid_backward", only=ONLY)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_in_the_fp32_grid_is_seen(name, mutants):
    small = Problem(hidden_size=40, batch=18, steps=7, bidirectional=True, packed=True)
    large = Problem(hidden_size=290, batch=10, steps=3)
    orders = ("random", "fifo", "block_up", "random")
    schedules = [
        grid(order, races=True, preempt=50, shape=1, seed=seed) for seed, order in enumerate(orders)
    ]
    found = any(
        is_seen(mutants[name], "simt_checks", "shows", [p], some)
        for p, some in ((small, schedules), (large, schedules[:1]))
    )
    assert found == (name != NO_BUG)
