"""The CUDA kernels, run by the emulator in tests/simt, agree with the float64 reference.

The same sources go through nvcc and through g++; see docs/kernels.md. The second half plants bugs
in small kernels and in the real ones, and demands that the emulator finds each.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_library import ALGORITHMS, ORDERS, ROOT, Emulated, KernelError, Schedule, load, plan
from simt_library import make as build

from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make, outputs_and_gradients
from fastlstm import reference

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("g++") is None, reason="needs make and g++"
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TILES = range(3)


def assert_matches(p: Problem, schedule: Schedule, variant: str = "plain", tolerance: float = 0):
    """Compare all outputs and gradients; returns them."""
    x = make(p)
    emulated = Emulated(load(variant), schedule)
    found = outputs_and_gradients(emulated.lstm, x)
    expected = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    for kind, ours, theirs in zip(("output", "gradient"), found, expected, strict=True):
        floor = 1e-2 * max(b.norm() for b in theirs)  # see TOLERANCE
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            error = (a.double() - b).norm() / torch.maximum(b.norm(), floor).clamp_min(1e-6)
            assert error < (tolerance or TOLERANCE[p.dtype]), (
                f"{kind} {j} of {p}, {schedule}: relative error {error:.2e}"
            )
    assert emulated.races == 0, emulated.first_race
    return [*found[0], *found[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_match_the_reference(name, dtype):
    assert_matches(Problem(dtype=dtype, **OPTIONS[name]), Schedule("random"))


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


@pytest.mark.parametrize("name", ["three layers", "everything", "wide projection"])
def test_tf32_is_as_close_as_its_ten_bits(name):
    schedule = Schedule("random", allow_tf32=True)
    found = assert_matches(Problem(**OPTIONS[name]), schedule, tolerance=2e-3)
    exact = assert_matches(Problem(**OPTIONS[name]), Schedule("random"))
    assert any(not torch.equal(a, b) for a, b in zip(found, exact, strict=True))


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


def problems_of(**more):
    return st.builds(
        Problem,
        input_size=st.integers(1, 40),
        hidden_size=st.integers(5, 40),
        num_layers=st.integers(1, 3),
        batch=st.integers(1, 35),
        steps=st.integers(1, 5),
        has_bias=st.booleans(),
        proj_size=st.integers(0, 4),
        bidirectional=st.booleans(),
        dropout=st.sampled_from([0.0, 0.5]),
        index=st.sampled_from([None, torch.int64]),
        packed=st.booleans(),
        states=st.booleans(),
        random_seed=st.integers(0, 1000),
        **more,
    )


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
        dense = lstm(x.input, x.h0, x.c0, x.weights, **x.options)
        wide = torch.cat((x.input, x.input), -1)
        for same in (x.input.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 6:]):
            assert not same.is_contiguous()
            again = lstm(same, x.h0, x.c0, x.weights, **x.options)
            assert all(torch.equal(a, b) for a, b in zip(dense, again, strict=True))
        expanded = x.input[:, :1].expand(-1, 4, -1)
        again = lstm(expanded, x.h0, x.c0, x.weights, **x.options)
        whole = lstm(expanded.contiguous(), x.h0, x.c0, x.weights, **x.options)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for j in range(3):  # only one of the outputs is used, and only some gradients are wanted
        leaves = [x.weights[1], x.c0]
        (ours, theirs) = (
            torch.autograd.grad(
                f(y.input.detach(), y.h0.detach(), y.c0, y.weights, **y.options)[j].double().sum(),
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
        Emulated(load("plain")).lstm(x.input, x.h0, x.c0, x.weights, **x.options)


def test_an_algorithm_without_kernels_is_refused():
    x = make(Problem())
    emulated = Emulated(load("plain"), Schedule(algorithm="cluster"))
    with pytest.raises(KernelError, match="no kernels yet"):
        emulated.lstm(x.input, x.h0, x.c0, x.weights, **x.options)


def test_planner_takes_larger_tiles_for_larger_problems():
    """And none that an older GPU's shared memory cannot hold. docs/kernels.md has these numbers."""

    def tiles(*problem):
        found = plan(load("plain"), torch.bfloat16, *problem)
        assert found.reason
        return found.tensor_cores, found.gates, found.cell

    assert tiles(256, 16) == (True, 0, 0)
    assert tiles(512, 100) == (True, 1, 1)
    assert tiles(2048, 128) == (True, 2, 1)
    tensor_cores, gates, cell = tiles(2048, 128, 75)
    assert not tensor_cores
    assert max(gates, cell) < 2
    assert not plan(load("plain"), torch.float32, 512, 100).tensor_cores


# ---- persistent kernels ----

PERSISTENT = {
    name: OPTIONS[name]
    for name in (
        "plain", "one of everything", "no bias", "zero states", "both directions", "three layers",
        "dropout", "dropout of everything", "index", "index, large vocabulary",
    )
}  # fmt: skip
HALF = [torch.bfloat16, torch.float16]
SHAPES = range(7)


def persistent(order="random", **more):
    return Schedule(order, algorithm="persistent", allow_tf32=True, **more)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", PERSISTENT)
def test_persistent_kernels_match_the_reference(name, dtype):
    tolerance = 2e-3 if dtype == torch.float32 else 0
    assert_matches(Problem(dtype=dtype, **PERSISTENT[name]), persistent(), tolerance=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 25, 33])
@pytest.mark.parametrize("hidden", [64, 100])
def test_every_shape_of_the_persistent_kernels(hidden, batch, shape):
    p = Problem(hidden_size=hidden, batch=batch, steps=3, dtype=torch.bfloat16)
    assert_matches(p, persistent(shape=shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_persistent_kernels_of_a_large_layer(dtype):
    """K in more than one slab a warp, CTAs whose last units are beyond H, several groups."""
    p = Problem(hidden_size=266, batch=20, steps=3, dtype=dtype, bidirectional=True)
    tolerance = 2e-3 if dtype == torch.float32 else 0
    assert_matches(p, persistent(shape=1, groups=2), tolerance=tolerance)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("active", [1, 2])
def test_batch_larger_than_a_launch_holds(active, directions):
    p = Problem(hidden_size=40, num_layers=2, batch=37, steps=3, bidirectional=directions == 2)
    schedule = persistent(shape=0, groups=3, active=active, wave=3 - directions)
    assert_matches(replace(p, dtype=torch.bfloat16), schedule)


@pytest.mark.parametrize("wave", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_wavefront_of_layers(wave, dropout):
    p = Problem(hidden_size=40, num_layers=3, batch=19, steps=4, dropout=dropout)
    assert_matches(replace(p, dtype=torch.bfloat16), persistent(shape=0, wave=wave, groups=2))


@pytest.mark.parametrize(
    ("shape", "hidden", "batch", "steps", "dtype"),
    [
        (0, 1, 1, 1, torch.bfloat16),  # a wavefront of one step
        (1, 7, 18, 2, torch.float16),
        (2, 33, 61, 3, torch.bfloat16),
        (3, 100, 3, 5, torch.float16),
        (4, 266, 9, 2, torch.bfloat16),  # K in more than one slab a warp
        (6, 65, 9, 4, torch.float32),
    ],
)
def test_wavefront_of_every_shape_at_odd_sizes(shape, hidden, batch, steps, dtype):
    p = Problem(hidden_size=hidden, num_layers=2, batch=batch, steps=steps, dropout=0.5)
    tolerance = 2e-3 if dtype == torch.float32 else 0
    assert_matches(replace(p, dtype=dtype), persistent(shape=shape, wave=2), tolerance=tolerance)


def test_wavefront_whose_last_launch_is_not_full():
    """Five layers, two at a time: what a launch hands to the next is the large product's."""
    p = Problem(hidden_size=20, num_layers=5, batch=3, dropout=0.5, dtype=torch.bfloat16)
    assert_matches(p, persistent(shape=0, wave=2))


def test_wavefront_needs_no_product_between_its_layers():
    """Two layers backward: 4 weight gradients and the input's, but none for the upper's input."""
    p = Problem(hidden_size=20, num_layers=2, dtype=torch.bfloat16, states=False)
    products = []
    for wave in (1, 2):
        x = make(p)
        emulated = Emulated(load("plain"), persistent(shape=0, wave=wave))
        outputs_and_gradients(emulated.lstm, x)
        products.append(emulated.products)
    assert products == [2 + 6, 1 + 5]


def test_wavefront_equals_layers_in_turn():
    """Bit for bit but for the input's part, which is added in another order: so, in float64's
    place, by the distance that order may make."""
    p = Problem(hidden_size=40, num_layers=2, batch=9, steps=4, dropout=0.4, dtype=torch.float16)
    runs = [assert_matches(p, persistent(shape=0, wave=wave)) for wave in (1, 2)]
    for a, b in zip(*runs, strict=True):
        assert (a.double() - b.double()).norm() <= 2e-3 * b.double().norm()


@pytest.mark.parametrize("wave", [1, 2])
def test_persistent_results_do_not_depend_on_the_schedule(wave):
    p = Problem(hidden_size=70, num_layers=2, batch=20, steps=4, dropout=0.4, dtype=torch.bfloat16)
    runs = [
        assert_matches(p, persistent(order, seed=seed, shape=0, wave=wave, groups=2))
        for seed, order in enumerate(ORDERS)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@settings(max_examples=15, deadline=None)
@given(problems_of(dtype=st.sampled_from(HALF)), st.sampled_from(ORDERS), st.integers(1, 3))
def test_drawn_problems_run_persistently(p, order, wave):
    p = replace(p, packed=False, proj_size=0)
    schedule = persistent(order, seed=p.random_seed, wave=1 if p.bidirectional else wave)
    assert_matches(p, schedule, tolerance=2 * TOLERANCE[p.dtype])


@pytest.mark.parametrize("name", ["projection", "packed"])
def test_persistent_kernels_refuse_what_they_have_not(name):
    with pytest.raises(KernelError, match='"persistent" cannot run: persistent kernels have no'):
        assert_matches(Problem(dtype=torch.bfloat16, **OPTIONS[name]), persistent())


@pytest.mark.parametrize("backward", [False, True])
def test_planner_runs_small_layers_as_a_wavefront(backward):
    def wave(hidden, layers=2, directions=1):
        found = plan(
            load("plain"), torch.bfloat16, hidden, 16, backward=backward, layers=layers,
            directions=directions,
        )  # fmt: skip
        assert ALGORITHMS[found.algorithm] == "persistent"
        return found.wave

    assert (wave(256), wave(256, 1), wave(256, 2, 2)) == (2, 1, 1)
    assert wave(128, 3) == 3
    assert wave(1024) == 1  # two layers need more SMs than there are


@pytest.mark.parametrize("seconds", ["0", "0.5", "1e9", ""])
def test_limit_of_a_wait_is_read_from_the_environment(seconds, monkeypatch):
    monkeypatch.setenv("FASTLSTM_WAIT_SECONDS", seconds)
    assert_matches(Problem(dtype=torch.bfloat16), persistent())


@pytest.mark.parametrize("seconds", ["ten", "5s", "-1", "nan", "inf", " ", "1e99"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(seconds, monkeypatch):
    monkeypatch.setenv("FASTLSTM_WAIT_SECONDS", seconds)
    expected = f"FASTLSTM_WAIT_SECONDS: expected a number of seconds .* got {seconds!r}"
    with pytest.raises(KernelError, match=expected.replace("'", '"')):
        assert_matches(Problem(dtype=torch.bfloat16), persistent())


@pytest.mark.parametrize(
    ("hidden", "batch", "dtype", "capability", "algorithm"),
    [
        (512, 100, torch.bfloat16, 90, "persistent"),
        (1024, 64, torch.bfloat16, 90, "persistent"),
        (256, 16, torch.float16, 80, "persistent"),
        (512, 200, torch.bfloat16, 90, "persistent"),  # in several launches
        (4096, 128, torch.bfloat16, 90, "stepwise"),  # 128 MiB of weights
        (512, 100, torch.float64, 90, "stepwise"),
        (512, 100, torch.float32, 90, "stepwise"),  # without tf32
        (512, 100, torch.bfloat16, 75, "stepwise"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_planner_keeps_weights_on_chip_where_they_fit(
    hidden, batch, dtype, capability, algorithm, backward
):
    found = plan(load("plain"), dtype, hidden, batch, capability, backward)
    assert ALGORITHMS[found.algorithm] == algorithm
    assert found.microseconds > 0


# ---- the race checker on the kernels ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_races(name, dtype):
    p = Problem(dtype=dtype, **OPTIONS[name])
    for seed, (order, tile, preempt) in enumerate([("random", 0, 50), ("block_down", 1, 0)]):
        assert_matches(p, Schedule(order, seed, True, preempt, tile), "race")


@pytest.mark.parametrize("preempt", [0, 50])
@pytest.mark.parametrize("name", ["both directions", "dropout", "index"])
def test_no_races_in_persistent_kernels(name, preempt):
    options = {**PERSISTENT[name], "hidden_size": 33, "batch": 18, "steps": 4}
    p = Problem(dtype=torch.bfloat16, **options)
    for order in ("random", "block_down"):
        assert_matches(p, persistent(order, races=True, preempt=preempt, shape=0), "race")


@pytest.mark.parametrize("order", ORDERS)
def test_no_races_in_a_wavefront(order):
    p = Problem(hidden_size=33, num_layers=3, batch=11, steps=4, dropout=0.5, dtype=torch.bfloat16)
    preempt = 50 * (order == "random")
    schedule = persistent(order, races=True, preempt=preempt, shape=0, wave=3, groups=2)
    assert_matches(p, schedule, "race")


def test_no_races_between_many_blocks():
    p = Problem(hidden_size=70, batch=35, steps=2, bidirectional=True, dtype=torch.bfloat16)
    assert_matches(p, Schedule("random", races=True, tile=1), "race")


def test_address_sanitizer_finds_nothing():
    """In a process of its own, with the sanitizer's runtime loaded first."""
    build("asan")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{x}.so"], capture_output=True, text=True)
        for x in ("asan", "ubsan")
    ]
    if not all(Path(x.stdout.strip()).is_absolute() for x in runtimes):
        pytest.skip("the compiler has no sanitizer runtime")
    code = (
        "import torch; from test_simt import *\n"
        "for name in ('wide projection', 'index, large vocabulary', 'everything'):\n"
        "  for tile, dtype in enumerate((torch.bfloat16, torch.float32)):\n"
        "    assert_matches(Problem(dtype=dtype, **OPTIONS[name]), Schedule('random', tile=tile),\n"
        "                   'asan')\n"
        "    print('right:', name, dtype)\n"
        "p = Problem(hidden_size=33, num_layers=3, batch=18, dropout=0.5, dtype=torch.bfloat16)\n"
        "for wave in (1, 2, 3):\n"
        "  assert_matches(p, persistent(shape=0, wave=wave), 'asan')\n"
        "  print('right: wavefront', wave)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(x.stdout.strip() for x in runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        },
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    assert found.stdout.count("right:") == 9


# ---- planted bugs ----

# In the order of tests/simt/planted.cu; what must be found under every schedule.
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


# (file of csrc/cuda, its text, the bug): each is planted in a copy of the kernels.
MUTANTS = {
    "stage not barred": (
        "tile.cuh",
        "wait_async<Tile::kStages - 2>();\n      __syncthreads();",
        "wait_async<Tile::kStages - 2>();",
    ),
    "stage not waited for": ("tile.cuh", "wait_async<Tile::kStages - 2>", "wait_async<99>"),
    "copy before the barrier": (
        "tile.cuh",
        "__syncthreads();\n      copy(k + Tile::kStages - 1);",
        "copy(k + Tile::kStages - 1);\n      __syncthreads();",
    ),
    "sums over operands in use": (
        "tile.cuh",
        "__syncthreads();\n    if (split_ > 0)\n      each",
        "if (split_ > 0)\n      each",
    ),
    "partial sums not barred": (
        "tile.cuh",
        "__syncthreads();\n    if (split_ > 0) return;",
        "if (split_ > 0) return;",
    ),
    "column sums not barred": (
        "sums.cuh",
        "sums[warp][lane] = sum;\n  __syncthreads();",
        "sums[warp][lane] = sum;",
    ),
    "two writers": (
        "rows.cuh",
        "if (step == args.steps - 1) args.first[args.begin + args.steps] = end;",
        "args.first[args.begin + step + 1] = end;",
    ),
    "K not padded": ("gradient_part.cuh", "if (depth_ != 4 * units_)", "if (false)"),
}
PERSISTENT_MUTANTS = {
    "h not waited for": (
        "persistent_forward.cuh",
        "begin, begin + slice, s, args.limit);",
        "begin, begin + slice, 0, args.limit);",
    ),
    "layer below not waited for": (
        "persistent_forward.cuh",
        "begin, begin + slice,\n               s + 1, args.limit);",
        "begin, begin + slice,\n               s, args.limit);",
    ),
    "signal before all have stored": (
        "persistent.cuh",
        "__syncthreads();\n  if (threadIdx.x == 0) store_release",
        "if (threadIdx.x == 0) store_release",
    ),
    "relaxed signal": ("persistent.cuh", "store_release(flag, count)", "*flag = count"),
    "persistent partial sums not barred": (
        "persistent.cuh",
        "      __syncthreads();\n      const int block",
        "      const int block",
    ),
    "partners not waited for": (
        "persistent_backward.cuh",
        "wait_for_partners(sent + column, args.columns, part, s + 1, args.limit);",
        "",
    ),
    "one buffer of partial sums": (
        "persistent_backward.cuh", "(int64_t(s % 2) * args.groups", "(int64_t(0) * args.groups",
    ),
    "layer above not waited for": (
        "persistent_backward.cuh", "slice,\n                 s + 1, args.limit);",
        "slice,\n                 s, args.limit);",
    ),
    "two places for what a lower layer reads": (
        "persistent_backward.cuh", "(int64_t(s % places) * 4", "(int64_t(s % 2) * 4",
    ),
    "no dropout between the layers": ("persistent_backward.cuh", "if (drops)", "if (false)"),
    "signals not reset": ("persistent_host.cuh", "this->zero(flags_,", "this->zero(flags_, 0 *"),
    "padding not zeroed": ("persistent_host.cuh", "if (!whole) this->", "if (false) this->"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """All mutants, two builds at a time; only the kernels' object differs from the race build."""
    base, folder = build("race").parent, tmp_path_factory.mktemp("mutants")

    def plant(name):
        file, text, bug = (MUTANTS | PERSISTENT_MUTANTS)[name]
        kernels, out = folder / name.replace(" ", "_") / "cuda", folder / name.replace(" ", "_")
        shutil.copytree(ROOT / "csrc" / "cuda", kernels)
        whole = (kernels / file).read_text()
        assert whole.count(text) == 1, f"{file} no longer holds the text that {name!r} replaces"
        (kernels / file).write_text(whole.replace(text, bug))
        for path in base.glob("*.o"):
            if f"cuda/{file}" not in path.with_suffix(".d").read_text():
                shutil.copy2(path, out / path.name)
        return build("race", CUDA=str(kernels), OUT=str(out), TYPES="bf16")

    with ThreadPoolExecutor(2) as pool:
        names = [*MUTANTS, *PERSISTENT_MUTANTS]
        return dict(zip(names, pool.map(plant, names), strict=True))


@pytest.mark.parametrize("name", MUTANTS)
def test_bug_planted_in_the_kernels_is_seen(name, mutants):
    library = ctypes.CDLL(str(mutants[name]))
    # Five stages backward: the last one reuses the place of the first, as do the partial sums.
    deep = {"hidden_size": 150, "batch": 5, "steps": 3, "dtype": torch.bfloat16}
    p = Problem(**{**OPTIONS["packed, both directions"], **deep})
    assert seen(Emulated(library, Schedule("random", races=True, tile=0)), p)


@pytest.mark.parametrize("name", PERSISTENT_MUTANTS)
def test_bug_planted_in_the_persistent_kernels_is_seen(name, mutants):
    library = ctypes.CDLL(str(mutants[name]))
    p = Problem(hidden_size=33, num_layers=2, batch=18, steps=6, dropout=0.4, dtype=torch.bfloat16)
    assert seen(Emulated(library, persistent(races=True, preempt=50, shape=0, wave=2)), p)


def seen(emulated, p):
    x = make(p)
    expected = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    try:
        found = outputs_and_gradients(emulated.lstm, x)
    except KernelError:
        return True
    wrong = any(
        not (a.double() - b).norm() < TOLERANCE[p.dtype] * b.norm()
        for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    )
    return wrong or emulated.races > 0
