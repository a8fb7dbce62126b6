"""The grid kernels, run by the emulator: packets whose words become visible one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, problems_of, sanitize
from simt_library import ORDERS, Emulated, KernelError, Schedule, load, plan

from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make
from fastlstm.algorithms import ALGORITHMS

pytestmark = NEEDED

HALF = [torch.bfloat16, torch.float16]
TYPES = [*HALF, torch.float32]
SHAPES = range(4)  # forward's; backward has three


def without_projection(name):
    return {key: value for key, value in OPTIONS[name].items() if key != "proj_size"}


# Zoneout without states: see the test of what is refused.
GRID = {name: without_projection(name) for name in OPTIONS if "projection" not in name} | {
    name: without_projection(name) | {"states": False} for name in ("zoneout", "every rule")
}


def grid(order="random", **more):
    return Schedule(order, algorithm="grid", allow_tf32=True, **more)


def tolerance_of(dtype):
    return 2e-3 if dtype == torch.float32 else 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", GRID)
def test_grid_kernels_match_the_reference(name, dtype):
    assert_matches(Problem(dtype=dtype, **GRID[name]), grid(), tolerance=tolerance_of(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden", [1, 7, 129])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_shape_at_odd_sizes(hidden, steps, shape):
    for batch, dtype in ((1, torch.bfloat16), (9, torch.float16), (33, torch.bfloat16)):
        p = Problem(hidden_size=hidden, batch=batch, steps=steps, dtype=dtype)
        assert_matches(p, grid(shape=shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_that_are_aligned_are_copied(dtype, shape):
    """What is not, element by element: both ways of backward to read gates and states."""
    for hidden in (64, 62):
        p = Problem(hidden_size=hidden, batch=17, cells=True, num_layers=2, dtype=dtype)
        assert_matches(p, grid(shape=shape), tolerance=tolerance_of(dtype))


@pytest.mark.parametrize(
    ("hidden", "shape", "dtype"),
    [
        (266, 0, torch.bfloat16),  # K in two slabs a warp, the last not full
        (266, 2, torch.float16),  # weights in shared memory, too
        (530, 0, torch.float32),
        (392, 3, torch.float32),
    ],
)
def test_layers_of_several_slabs_a_warp(hidden, shape, dtype):
    p = Problem(hidden_size=hidden, batch=10, steps=3, dtype=dtype, packed=True)
    assert_matches(p, grid(shape=shape), tolerance=tolerance_of(dtype))


@pytest.mark.parametrize(("hidden", "shape"), [(800, 2), (1030, 0), (1540, 0)])
def test_backward_of_many_blocks_a_warp(hidden, shape):
    """4, 6 and 8: the kernels that only large layers run, the last block of a warp not theirs."""
    p = Problem(hidden_size=hidden, batch=2, steps=2, dtype=torch.bfloat16)
    assert_matches(p, Schedule(backward_algorithm="grid", shape=shape))


@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_batch_and_directions_that_one_launch_does_not_hold(packed, active):
    p = Problem(hidden_size=40, num_layers=2, batch=29, bidirectional=True, packed=packed)
    assert_matches(replace(p, dtype=torch.bfloat16), grid(shape=0, active=active))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_first_states_may_be_of_any_size(packed, dtype):
    """The exchange carries no h beyond 1; backwards in time, sequences enter late, each from its
    h0."""
    p = Problem(hidden_size=40, batch=19, steps=6, bidirectional=True, packed=packed, dtype=dtype)
    x = make(p)
    with torch.no_grad():
        x.h0.mul_(50)
    found = Emulated(load("plain"), grid()).lstm(*x.arguments)
    stepwise = Schedule(allow_tf32=True)
    same = Emulated(load("plain"), stepwise).lstm(*x.arguments)
    for a, b in zip(found, same, strict=True):
        assert (a.double() - b.double()).norm() < TOLERANCE[torch.bfloat16] / 3 * b.double().norm()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("order", ["random", "block_down"])
def test_a_nan_comes_out_as_nan_where_it_went_in(order, dtype):
    """In its sequence, from its step on; nobody waits for ever, and other sequences are right."""
    p = Problem(hidden_size=70, batch=11, steps=7, dtype=dtype)
    x = make(p)
    clean = Emulated(load("plain"), grid(order)).lstm(*x.arguments)
    with torch.no_grad():
        x.input[2, 4, 0] = torch.nan
    y, h_n, c_n = (t.detach() for t in Emulated(load("plain"), grid(order)).lstm(*x.arguments))
    expected = torch.zeros(p.steps, p.batch, dtype=torch.bool)
    expected[2:, 4] = True
    assert torch.equal(y.isnan().all(-1), expected)
    assert torch.equal(y.isnan().any(-1), expected)
    assert h_n[0, 4].isnan().all()
    assert c_n[0, 4].isnan().all()
    assert torch.equal(y[~expected], clean[0].detach()[~expected])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_nan_of_the_gradient_stays_in_its_sequence(dtype):
    p = Problem(hidden_size=70, batch=11, steps=5, dtype=dtype)
    x = make(p)
    y, _, _ = Emulated(load("plain"), grid()).lstm(*x.arguments)
    arriving = torch.ones_like(y)
    arriving[3, 6, 2] = torch.nan
    (found,) = torch.autograd.grad(y, x.input, arriving)
    expected = torch.zeros(p.steps, p.batch, dtype=torch.bool)
    expected[:4, 6] = True
    assert torch.equal(found.isnan().any(-1), expected)


def test_results_do_not_depend_on_the_schedule():
    p = Problem(
        hidden_size=70, num_layers=2, batch=20, steps=4, dropout=0.4, packed=True,
        bidirectional=True, dtype=torch.bfloat16,
    )  # fmt: skip
    runs = [assert_matches(p, grid(order, seed=seed)) for seed, order in enumerate(ORDERS)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@settings(max_examples=25, deadline=None)
@given(
    problems_of(dtype=st.sampled_from(HALF)), st.sampled_from(ORDERS), st.integers(-1, 3),
    st.integers(0, 2),
)  # fmt: skip
def test_drawn_problems_run_over_the_grid(p, order, shape, active):
    p = replace(p, proj_size=0)
    schedule = grid(order, seed=p.random_seed, shape=shape, active=active)
    assert_matches(p, schedule, tolerance=2 * TOLERANCE[p.dtype])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"proj_size": 3}, "the grid's kernels have no projection"),
        ({"layer_norm": True}, "the grid's kernels have no layer normalisation"),
        ({"zoneout_h": 0.4}, "zoneout may keep an h0 beyond 1"),
    ],
)
def test_grid_kernels_refuse_what_they_have_not(options, why):
    with pytest.raises(KernelError, match=f'"grid" cannot run: {why}'):
        assert_matches(Problem(dtype=torch.bfloat16, **options), grid())


def test_tf32_carries_an_h0_that_zoneout_keeps():
    p = Problem(batch=9, steps=9, zoneout_h=0.4, zoneout_c=0.3, num_layers=2, packed=True)
    assert_matches(p, grid(), tolerance=2e-3)


# ---- the planner ----


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("hidden", "batch", "directions", "dtype", "capability", "algorithm"),
    [
        (512, 16, 1, torch.bfloat16, 90, "cluster"),
        (800, 16, 1, torch.bfloat16, 90, "grid"),
        (1024, 64, 1, torch.float16, 90, "grid"),
        (1024, 16, 2, torch.bfloat16, 90, "grid"),
        (2048, 8, 1, torch.bfloat16, 90, "grid"),
        (4096, 32, 1, torch.bfloat16, 90, "stepwise"),  # 128 MiB of weights
        (768, 16, 1, torch.bfloat16, 75, "stepwise"),
        (768, 16, 1, torch.float64, 90, "stepwise"),
        (768, 16, 1, torch.float32, 90, "grid"),  # without tf32
        (1024, 64, 1, torch.float32, 90, "grid"),
        (256, 16, 1, torch.float32, 80, "grid"),
        (1280, 16, 1, torch.float32, 90, "stepwise"),  # 25 MiB of weights
    ],
)
def test_planner_keeps_large_layers_on_the_grid(
    hidden, batch, directions, dtype, capability, algorithm, backward
):
    found = plan(load("plain"), dtype, hidden, batch, capability, backward, directions=directions)
    assert ALGORITHMS[found.algorithm] == algorithm
    assert found.microseconds > 0
    if algorithm == "grid":
        assert found.ctas * found.active <= 132
        assert found.groups * found.sequences >= batch
        assert found.ctas * found.units >= hidden


# ---- the race checker and the address sanitizer ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preempt", [0, 50])
def test_no_races_in_grid_kernels(preempt, shape):
    p = Problem(hidden_size=40, batch=18, steps=5, bidirectional=True, dtype=torch.bfloat16)
    for order, packed in (("random", True), ("block_down", False)):
        schedule = grid(order, races=True, preempt=preempt, shape=shape)
        assert_matches(replace(p, packed=packed), schedule, "race")


def test_address_sanitizer_finds_nothing():
    sanitize(
        "from test_emulated_grid import grid\n"
        "for shape in range(4):\n"
        "  p = Problem(hidden_size=40 if shape % 2 else 33, batch=10, packed=True, cells=True,\n"
        "              bidirectional=True, dtype=torch.bfloat16)\n"
        "  assert_matches(p, grid(shape=shape), 'asan')\n"
        "  print('right:', shape)\n",
        right=4,
    )


# ---- planted bugs ----

# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "phase that does not toggle": ("grid/phase.cuh", "step & 2 ? 0u : bits", "bits"),
    "one place for h": (
        "grid/forward.cuh", "(s & 1) * slot_bytes", "0", "exchange + (s & 1) * slot_bytes +",
    ),
    "memory that is not zeroed": (
        "grid/forward_pass.cuh", "count * 2 * team_.slot_bytes", "0",
        "stack_.zero(exchange_, count * 2 * team_.slot_bytes",
    ),
    "only the first words are looked at": (
        "grid/phase.cuh",
        "(v.x ^ phase) | (v.y ^ phase) | (v.z ^ phase) | (v.w ^ phase)", "v.x ^ phase",
    ),
    "partial sums not barred": (
        "grid/forward.cuh", "__syncthreads();", "",
        "wait_async<kGrid.stages - 1>();\n    __syncthreads();",
    ),
    "outputs not barred": (
        "grid/forward.cuh", "__syncthreads();", "", "s < walk.length; ++s) {\n    __syncthreads();",
    ),
    "outputs overwritten while they are read": (
        "grid/forward.cuh", "__syncthreads();", "",
        "partial.begin(sums, initial);\n      __syncthreads();",
    ),
    "input part not waited for": ("grid/forward.cuh", "wait_async<kGrid.stages - 1>();", ""),
    "stage filled a step early": (
        "grid/forward_rows.cuh", "s % kStages", "(s + 1) % kStages",
        "char* stage = stages_ + s % kStages",
    ),
    "late sequences begin from nothing": (
        "grid/forward.cuh", "return {steps.active(s - 1), steps.active(s)};", "return {0, 0};",
    ),
    "sums not waited for": (
        "grid/backward_product.cuh", "any_off()", "false", "if (any_off()) {",
    ),
    "only packets of the first lanes are waited for": (
        "grid/backward_product.cuh", "i * 32 + lane < packets", "i * 32 + lane < packets / 2",
        "i * 32 + lane < packets)",
    ),
    "one place for sums": ("grid/backward.cuh", "s % 2", "0", "return s % 2; };"),
    "rows of a sequence copied a step late": (
        "grid/backward_copies.cuh", "p.previous ? next.first : now.first", "now.first",
    ),
    "dgates not barred": (
        "grid/backward.cuh", "__syncthreads();", "",
        "wait_async<kStages - 2>();\n    __syncthreads();",
    ),
    "copies of backward not waited for": ("grid/backward.cuh", "wait_async<kStages - 2>();", ""),
    "steps found too late": ("grid/walk.cuh", "kAhead = 5", "kAhead = 3"),
}  # fmt: skip


ALONE = ["steps found too late"]
ONLY = [
    ("grid/forward_pass.cuh", "run_steps<index.value>", "index.value == 1"),
    (
        "grid/backward_pass.cuh",
        "launch_cooperative(grid_backward_kernel",
        "index.value == 1 && kBlocks == 1",
    ),
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return plant(MUTANTS, folder, kinds="grid_forward grid_backward", only=ONLY, alone=ALONE)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_in_the_grid_kernels_is_seen(name, mutants):
    p = Problem(hidden_size=40, batch=18, steps=9, bidirectional=True, packed=True)
    orders = ("random", "fifo", "block_up", "random", "random", "block_up")
    schedules = [
        grid(order, races=True, preempt=50, shape=1, seed=seed) for seed, order in enumerate(orders)
    ]
    p = replace(p, dtype=torch.bfloat16)
    assert is_seen(mutants[name], "simt_checks", "shows", [p], schedules) == (name != NO_BUG)
