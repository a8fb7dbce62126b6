"""The persistent kernels, run by the emulator as test_simt.py runs the others."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import NEEDED, assert_matches, plant, problems_of, sanitize, seen
from simt_library import ORDERS, Emulated, KernelError, Schedule, load, plan

from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make, outputs_and_gradients
from fastlstm.algorithms import ALGORITHMS

pytestmark = NEEDED

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


def test_gradient_of_the_cells_of_every_step():
    p = Problem(hidden_size=64, num_layers=2, batch=9, cells=True, dtype=torch.bfloat16)
    assert_matches(p, persistent())
    assert_matches(replace(p, bidirectional=True), persistent())


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


# ---- the race checker and the address sanitizer ----


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


def test_address_sanitizer_finds_nothing():
    sanitize(
        "from test_simt_persistent import persistent\n"
        "p = Problem(hidden_size=33, num_layers=3, batch=18, dropout=0.5, dtype=torch.bfloat16)\n"
        "for wave in (1, 2, 3):\n"
        "  assert_matches(p, persistent(shape=0, wave=wave), 'asan')\n"
        "  print('right: wavefront', wave)\n",
        right=3,
    )


# ---- planted bugs ----

# (file of csrc/cuda, its text, the bug): each is planted in a copy of the kernels.
MUTANTS = {
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
    return plant(MUTANTS, tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("name", MUTANTS)
def test_bug_planted_in_the_persistent_kernels_is_seen(name, mutants):
    library = ctypes.CDLL(str(mutants[name]))
    p = Problem(hidden_size=33, num_layers=2, batch=18, steps=6, dropout=0.4, dtype=torch.bfloat16)
    assert seen(Emulated(library, persistent(races=True, preempt=50, shape=0, wave=2)), p)
