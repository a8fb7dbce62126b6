"""The CUDA kernels, run by the emulator in tests/cuda/simt, agree with the float64 reference.

The same sources go through nvcc and through g++; see docs/kernels.md. The second half plants bugs
in small kernels and in the real ones, and demands that the emulator finds each. The kernels
of clusters and of the grid have files of their own, test_emulated_cluster.py and the like.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import (
    NEEDED,
    NO_BUG,
    NORMED,
    assert_matches,
    is_seen,
    plant,
    problems_of,
    sanitize,
)
from simt_library import ORDERS, Emulated, KernelError, Schedule, load, plan

from benchmarks.accuracy import limit_of
from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make
from fastlstm import reference

pytestmark = NEEDED

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LIBRARY = 3  # kLibraryTile
TILES = range(LIBRARY + 1)  # the last one leaves products to the library


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS | NORMED)
def test_kernels_match_the_reference(name, dtype):
    assert_matches(Problem(dtype=dtype, **(OPTIONS | NORMED)[name]), Schedule("random"))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 3, 7, 33, 100])
def test_every_tile_at_odd_sizes(hidden, dtype, tile):
    p = Problem(hidden_size=hidden, input_size=hidden + 1, batch=min(hidden, 33), steps=3)
    assert_matches(replace(p, dtype=dtype), Schedule("random", tile=tile))


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_of_a_batch_larger_than_it(tile):
    p = Problem(hidden_size=100, batch=70, steps=2, bidirectional=True, proj_size=33)
    assert_matches(replace(p, dtype=torch.bfloat16), Schedule("random", tile=tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_more_rows_than_one_launch_adds(dtype):
    """Those of biases: a CTA adds 512 rows."""
    p = Problem(hidden_size=3, input_size=2, batch=37, steps=14, dtype=dtype)
    assert_matches(p, Schedule("random"))


@pytest.mark.parametrize("name", ["three layers", "everything", "wide projection"])
def test_tf32_is_as_close_as_its_ten_bits(name):
    schedule = Schedule("random", allow_tf32=True)
    found = assert_matches(Problem(**OPTIONS[name]), schedule, tolerance=2e-3)
    exact = assert_matches(Problem(**OPTIONS[name]), Schedule("random"))
    assert any(not torch.equal(a, b) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("name", NORMED)
def test_normalised_tf32_is_as_close_as_the_problem_allows(name):
    for seed in range(3):
        p = Problem(random_seed=seed, **NORMED[name])
        schedule = Schedule("fifo", allow_tf32=True)
        assert_matches(p, schedule, tolerance=limit_of(p, "tf32"))


@pytest.mark.parametrize("name", ["three layers", "packed, both directions", "projection"])
def test_gradient_of_the_cells_of_every_step(name):
    for dtype in (torch.float32, torch.bfloat16):
        assert_matches(Problem(dtype=dtype, cells=True, **OPTIONS[name]), Schedule("random"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_schedule(dtype):
    p = Problem(**{**OPTIONS["everything"], "dtype": dtype})
    runs = [assert_matches(p, Schedule(order, seed)) for seed, order in enumerate(ORDERS)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_code_for_gpus_without_tensor_cores(name):
    p = Problem(dtype=torch.bfloat16, **OPTIONS[name])
    assert_matches(p, Schedule("random", capability=75), "old")


@settings(max_examples=25, deadline=None)
@given(problems_of(dtype=st.sampled_from(DTYPES)), st.sampled_from(ORDERS), st.sampled_from(TILES))
def test_drawn_problems_match_the_reference(p, order, tile):
    # Sums that cancel leave small gradients: ten times the usual distance.
    schedule = Schedule(order, p.random_seed, tile=tile)
    assert_matches(p, schedule, tolerance=2 * TOLERANCE[p.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_input_and_states_that_start_nowhere(dtype):
    """batch_first, a slice of a wider tensor, an expanded one, and gradients that are missing."""
    p = Problem(dtype=dtype, batch=4, steps=5, input_size=6)
    x = make(p)
    lstm = Emulated(load("plain")).lstm
    with torch.no_grad():
        dense = lstm(*x.arguments)
        wide = torch.cat((x.input, x.input), -1)
        for same in (x.input.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 6:]):
            assert not same.is_contiguous()
            again = lstm(same, *x.arguments[1:])
            assert all(torch.equal(a, b) for a, b in zip(dense, again, strict=True))
        expanded = x.input[:, :1].expand(-1, 4, -1)
        again = lstm(expanded, *x.arguments[1:])
        whole = lstm(expanded.contiguous(), *x.arguments[1:])
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for j in range(3):  # only one of the outputs is used, and only some gradients are wanted
        leaves = [x.weights[1], x.c0]
        (ours, theirs) = (
            torch.autograd.grad(
                f(y.input.detach(), (y.h0.detach(), y.c0), *y.arguments[2:])[j].double().sum(),
                [y.weights[1], y.c0],
            )
            for f, y in ((lstm, x), (reference.lstm, x.to(torch.float64)))
        )
        assert len(ours) == len(leaves)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.double() - b).norm() / b.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_an_index_out_of_range_ends_the_kernel(bad):
    x = make(Problem(index=torch.int64, input_size=5))
    x.input[1, 2] = bad
    with pytest.raises(KernelError, match="index out of range"):
        Emulated(load("plain")).lstm(*x.arguments)


def test_an_algorithm_that_cannot_run_a_problem_is_refused():
    x = make(Problem(proj_size=3, dtype=torch.bfloat16))
    emulated = Emulated(load("plain"), Schedule(algorithm="cluster"))
    with pytest.raises(KernelError, match='"cluster" cannot run: clusters have no projection'):
        emulated.lstm(*x.arguments)


def tiles(dtype, *problem):
    found = [
        plan(load("plain"), dtype, *problem, backward=backward, algorithm="stepwise")
        for backward in (False, True)
    ]
    assert all(x.reason for x in found)
    return found[0].tensor_cores, found[0].cell_tile, found[1].cell_tile


def test_planner_takes_larger_tiles_for_larger_problems():
    """And none that an older GPU's shared memory cannot hold. docs/kernels.md has these numbers."""
    assert tiles(torch.float64, 256, 16) == (False, 0, 0)
    assert tiles(torch.float64, 512, 100) == (False, 1, 0)
    assert tiles(torch.float64, 2048, 128) == (False, 2, 1)
    assert max(tiles(torch.bfloat16, 2048, 128, 75)) < 2


def test_planner_leaves_large_products_to_the_library():
    """Where a step of its own is one small kernel, it stays one."""
    assert tiles(torch.bfloat16, 64, 128) == (True, 0, 0)
    assert tiles(torch.bfloat16, 256, 16) == (True, 0, LIBRARY)
    assert tiles(torch.bfloat16, 2048, 128, 80) == (True, LIBRARY, LIBRARY)
    assert tiles(torch.bfloat16, 2050, 128) == (True, LIBRARY, LIBRARY)
    assert tiles(torch.float16, 4096, 1) == (True, LIBRARY, LIBRARY)
    assert tiles(torch.float32, 768, 16) == (False, 0, LIBRARY)
    assert tiles(torch.float32, 1024, 64) == (False, LIBRARY, LIBRARY)
    assert LIBRARY not in tiles(torch.float64, 1024, 64)
    assert LIBRARY not in tiles(torch.float16, 4096, 1, 75)


# ---- the race checker on the kernels ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS | NORMED)
def test_no_races(name, dtype):
    p = Problem(dtype=dtype, **(OPTIONS | NORMED)[name])
    for seed, (order, tile, preempt) in enumerate(
        [("random", 0, 50), ("block_down", 1, 0), ("random", LIBRARY, 0)]
    ):
        assert_matches(p, Schedule(order, seed, True, preempt, tile), "race")


def test_no_races_between_many_blocks():
    p = Problem(hidden_size=70, batch=35, steps=2, bidirectional=True, dtype=torch.bfloat16)
    assert_matches(p, Schedule("random", races=True, tile=1), "race")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_millions_of_sequences_fit_a_grid(dtype):
    """Which has 65,535 CTAs along the rows of a batch at most; the library has no such bound."""
    tile_rows = (16, 32, 64)
    wide_sequences = (32, 64, 128)
    for batch in (10**6, 11 * 10**5, 3 * 10**6, 5 * 10**6, 10**7):
        for hidden in (8, 16, 32, 256):
            rows = {LIBRARY: batch}
            rows |= dict(enumerate(tile_rows)) | dict(enumerate(wide_sequences, LIBRARY + 1))
            for backward in (False, True):
                found = plan(
                    load("plain"), dtype, hidden, batch, backward=backward, algorithm="stepwise"
                )
                assert batch <= 65535 * rows[found.cell_tile]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_saved_may_begin_anywhere(dtype):
    """As saved_tensors_hooks may hand it back: the race checker refuses misaligned accesses."""

    def moved(x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        room[1:] = x.flatten()
        return room[1:].view(x.shape)

    p = Problem(hidden_size=16, batch=3, steps=3, dtype=dtype)
    runs = []
    for move in (False, True):
        x = make(p)
        emulated = Emulated(load("race"), Schedule("random", races=True))
        y = emulated.lstm(*x.arguments)[0]
        if move:
            y.grad_fn.saved = [moved(s) for s in y.grad_fn.saved]
        runs.append(torch.autograd.grad(y, x.leaves(), torch.ones_like(y)))
        assert emulated.races == 0
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_address_sanitizer_finds_nothing():
    sanitize(
        "for name in ('wide projection', 'index, large vocabulary', 'everything', 'every rule'):\n"
        "  for tile, dtype in enumerate((torch.bfloat16, torch.float32)):\n"
        "    assert_matches(Problem(dtype=dtype, **OPTIONS[name]), Schedule('random', tile=tile),\n"
        "                   'asan')\n"
        "    print('right:', name, dtype)\n",
        right=8,
    )


# ---- planted bugs ----

# In the order of tests/cuda/simt/planted.cu; what must be found under every schedule.
PLANTED = {
    "no bug": "nothing",
    "no bug, fences": "nothing",
    "no barrier before the arrival": "race",
    "no barrier after the wait": "race",
    "relaxed arrival": "race",
    "relaxed wait": "race",
    "fence dropped before the arrival": "race",
    "fence dropped after the wait": "race",
    "one buffer": "wrong",
    "wait too short": "race",
    "wait too long": "livelock",
    "flag not reset": "race",
    "copy not waited for": "race",
    "copy without a barrier": "race",
    "copy too early": "race",
    "uninitialised shared memory": "wrong",
    "past the end of shared memory": "wrong",
    "divergent barrier": "different barriers",
    "shuffle from outside": "not in its mask",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_seen(name, order):
    races, message = ctypes.c_int64(), ctypes.create_string_buffer(512)
    bug = list(PLANTED).index(name)
    outcome = load("race").simt_planted(
        bug, ORDERS.index(order), ctypes.c_uint64(3), 1, ctypes.byref(races), message
    )
    text, expected = message.value.decode(), PLANTED[name]
    if expected == "nothing":
        assert (outcome, races.value, text) == (0, 0, "")
    elif expected == "race":
        assert races.value > 0
        assert "planted.cu" in text or "device.cuh" in text
    elif expected == "wrong":
        assert outcome == 1
    else:
        assert outcome == 2
        assert expected in text


def test_some_bugs_show_in_no_result():
    """Why there is a checker: the memory of the CPU hides a dropped fence in every schedule."""
    races, message = ctypes.c_int64(), ctypes.create_string_buffer(512)
    for name in ("relaxed arrival", "relaxed wait", "fence dropped before the arrival"):
        for order in range(len(ORDERS)):
            outcome = load("race").simt_planted(
                list(PLANTED).index(name),
                order,
                ctypes.c_uint64(1),
                0,
                ctypes.byref(races),
                message,
            )
            assert (outcome, races.value) == (0, 0)


# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "stage not barred": (
        "stepwise/tile.cuh",
        "__syncthreads();",
        "",
        "wait_async<Tile::kStages - 2>();\n      __syncthreads();",
    ),
    "stage not waited for": (
        "stepwise/tile.cuh",
        "wait_async<Tile::kStages - 2>();",
        "wait_async<99>();",
    ),
    "copy before the barrier": (
        "stepwise/tile.cuh",
        "__syncthreads();\n      copy(k + Tile::kStages - 1, [](int) { return true; });",
        "copy(k + Tile::kStages - 1, [](int) { return true; });\n      __syncthreads();",
    ),
    "sums over operands in use": (
        "stepwise/tile.cuh",
        "__syncthreads();",
        "",
        "void share(const Sums& sums) {\n    __syncthreads();",
    ),
    "shared sums not barred": (
        "stepwise/tile.cuh",
        "__syncthreads();",
        "",
        "    __syncthreads();\n  }\n\n  unsigned char* shared_;",
    ),
    "column sums not barred": (
        "shared/sums.cuh",
        "__syncthreads();",
        "",
        "sums[warp][lane] = sum;\n  __syncthreads();",
    ),
    "two writers": (
        "shared/rows.cuh",
        "if (step == args.steps - 1) args.first[args.begin + args.steps] = end;",
        "args.first[args.begin + step + 1] = end;",
    ),
    "h copied before the wait": (
        "stepwise/step_kernel.cuh",
        "if constexpr (!FASTLSTM_SM90) product.begin_left();",
        "product.begin_left();",
    ),
    "first step begins early": (
        "stepwise/step_launcher.cuh",
        "begin_ = Begin::late;",
        "begin_ = Begin::early;",
        "void begin_late() const { begin_ = Begin::late; }",
    ),
    "K not padded": (
        "shared/gradient_part.cuh",
        "depth_ != 4 * units_",
        "false",
        "if (depth_ != 4 * units_)",
    ),
}


ONLY = [("stepwise/step_launcher.cuh", "run_kernel(step_kernel<Shape, Step>", "kIndex == 0")]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return plant(MUTANTS, folder, kinds="stepwise", only=ONLY)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_in_the_kernels_is_seen(name, mutants):
    # Five stages backward: the last one reuses the place of the first, as do the sums.
    p = Problem(hidden_size=150, batch=5, steps=3, packed=True, dtype=torch.bfloat16)
    # And few enough threads for the emulator to run several kernels at once with the packing of W.
    small = Problem(hidden_size=5, batch=2, steps=3, dtype=torch.bfloat16)
    schedule = Schedule("random", races=True, tile=0)
    found = is_seen(mutants[name], "simt_checks", "shows", [small, p], [schedule])
    assert found == (name != NO_BUG)
