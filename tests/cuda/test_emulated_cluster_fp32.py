"""Both passes in thread-block clusters in full fp32, by multiply-adds, run by the emulator.

What these kernels share with those of tensor cores is tested in test_emulated_cluster.py and
test_emulated_cluster_backward.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, problems_of, sanitize
from simt_library import ORDERS, Emulated, KernelError, Schedule, load, plan

from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make

pytestmark = NEEDED

# Everything but a projection.
CLUSTERED = {
    name: fields | {"proj_size": 0} for name, fields in OPTIONS.items() if "projection" not in name
}
# An H that leaves some CTAs, or the last one in part, without units.
HIDDEN = {1: 63, 2: 57, 4: 97, 8: 129, 16: 264}


def clustered(order="random", **more):
    return Schedule(order, algorithm="cluster", **more)


def run(p, schedule, saves=True, change=lambda x: None):
    """Outputs of a forward pass alone; `change` may change the tensors before."""
    x = make(p)
    with torch.no_grad():
        change(x)
        return Emulated(load("plain"), schedule, saves=saves).lstm(*x.arguments)


@pytest.mark.parametrize("name", CLUSTERED)
def test_fp32_clusters_match_the_reference(name):
    assert_matches(Problem(**CLUSTERED[name]), clustered())


@pytest.mark.parametrize("hidden", [33, 40])  # rows copied by element, and in bulk
def test_every_rule_in_groups_of_packed_sequences(hidden):
    rules = {"recurrent_dropout": 0.2, "zoneout_h": 0.3, "zoneout_c": 0.4, "cell_clip": 1.0}
    p = Problem(hidden_size=hidden, batch=19, steps=10, packed=True, cells=True, **rules)
    assert_matches(replace(p, bidirectional=True), clustered(ctas=2, units=32, sequences=16))


@pytest.mark.parametrize(
    ("ctas", "units", "sequences"),
    [(1, 64, 8), (2, 32, 8), (2, 32, 16), (4, 32, 8), (4, 32, 16), (8, 32, 16), (16, 32, 8)],
)
def test_every_fp32_cluster_at_an_odd_size(ctas, units, sequences):
    """Sequences that end or enter on the way, a group that is not full, unaligned rows."""
    p = Problem(hidden_size=HIDDEN[ctas], batch=sequences - 5, packed=True)
    assert_matches(p, clustered(ctas=ctas, units=units, sequences=sequences))


@pytest.mark.parametrize(("ctas", "units"), [(1, 64), (2, 32)])
def test_more_steps_than_are_loaded_ahead(ctas, units):
    p = Problem(hidden_size=64, batch=3, steps=19)
    assert_matches(p, clustered(ctas=ctas, units=units, sequences=8))


@pytest.mark.parametrize(
    ("hidden", "batch", "steps"),
    [(1, 9, 1), (1, 3, 2), (3, 1, 1), (3, 17, 2), (7, 9, 3), (65, 1, 1), (64, 7, 3), (129, 3, 2)],
)
def test_odd_sizes_in_fp32(hidden, batch, steps):
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, bidirectional=hidden < 64)
    assert_matches(p, clustered())


def test_a_full_cluster_of_sixteen():
    """H512: every weight in registers and in shared memory counts."""
    assert_matches(Problem(hidden_size=512, batch=2, steps=2), clustered())


def test_h_keeps_its_whole_mantissa():
    """As close to float64 as float32 is, which tf32 is not."""
    p = Problem(hidden_size=60, batch=5, steps=5)
    assert_matches(p, clustered(), tolerance=2e-6)
    with pytest.raises(AssertionError, match="relative error"):
        assert_matches(p, Schedule("fifo", algorithm="cluster", allow_tf32=True), tolerance=1e-4)


def test_small_gates_keep_their_digits():
    """Near 0 a tanh made of exponentials would lose them."""

    def shrink(x):
        for tensor in (x.input, x.h0, x.c0, *x.weights):
            tensor *= 1e-3

    p = Problem(hidden_size=64, batch=3, steps=1, bidirectional=True)
    found = run(p, clustered(), change=shrink)
    x = make(p)
    with torch.no_grad():
        shrink(x)
        exact = Emulated(load("plain"), Schedule()).lstm(*x.to(torch.float64).arguments)
    for a, b in zip(found[:3], exact[:3], strict=True):
        assert (a.double() - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize(("ctas", "units"), [(1, 64), (2, 32)])
def test_fp32_results_do_not_depend_on_the_schedule(ctas, units):
    p = Problem(hidden_size=60, num_layers=2, batch=20, steps=5, dropout=0.4, packed=True)
    runs = [
        assert_matches(p, clustered(order, seed=seed, ctas=ctas, units=units, sequences=8))
        for seed, order in enumerate(ORDERS)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize(
    ("hidden", "batch", "steps", "more"),
    [
        (64, 1, 1, {}),
        (33, 3, 2, {"bidirectional": True}),
        (63, 5, 19, {"packed": True}),  # more steps than are loaded ahead
        (40, 129, 3, {"packed": True, "states": True}),
        (40, 7, 10, {"packed": True, "cells": True, "bidirectional": True, "zoneout_h": 0.3,
                     "zoneout_c": 0.4, "recurrent_dropout": 0.2, "cell_clip": 1.0}),
    ],
)  # fmt: skip
def test_groups_of_four_in_one_cta(hidden, batch, steps, more):
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, **more)
    assert_matches(p, clustered(ctas=1, units=64, sequences=4))


def test_groups_of_four_and_eight_in_one_cta_give_the_same_bits():
    p = Problem(hidden_size=61, batch=11, steps=4, packed=True)
    four, eight = (assert_matches(p, clustered(ctas=1, units=64, sequences=n)) for n in (4, 8))
    assert all(torch.equal(a, b) for a, b in zip(four, eight, strict=True))


def test_groups_of_either_size_give_the_same_bits_in_fp32():
    """Forward and backward: which sequences share a cluster is no part of the arithmetic."""
    p = Problem(hidden_size=100, batch=21, steps=4, packed=True)
    small, large = (assert_matches(p, clustered(ctas=4, units=32, sequences=n)) for n in (8, 16))
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("name", ["packed, both directions", "every rule"])
def test_fp32_inference_gives_the_bits_of_training(name):
    p = Problem(**CLUSTERED[name])
    saved, kept = run(p, clustered()), run(p, clustered(), saves=False)
    assert all(torch.equal(a, b) for a, b in zip(saved[:3], kept[:3], strict=True))


@pytest.mark.parametrize(("ctas", "units"), [(1, 64), (4, 32)])
def test_nan_stays_in_its_sequence_in_fp32(ctas, units):
    x = make(p := Problem(hidden_size=60, batch=11, steps=5))
    with torch.no_grad():
        x.input[2, 5] = torch.nan
    schedule = clustered(ctas=ctas, units=units, sequences=8)
    y = Emulated(load("plain"), schedule).lstm(*x.arguments)[0]
    others = [b for b in range(p.batch) if b != 5]
    assert y[2:, 5].isnan().all()
    assert not y[:2].isnan().any()
    assert not y[:, others].isnan().any()
    of_input, of_h0 = torch.autograd.grad(y.sum(), (x.input, x.h0))
    assert of_input[:, 5].isnan().all()
    assert not of_input[:, others].isnan().any()
    assert not of_h0[0, others].isnan().any()


@settings(max_examples=8, deadline=None)
@given(problems_of(), st.sampled_from(ORDERS), st.sampled_from([8, 16]))
def test_drawn_problems_run_in_fp32_clusters(p, order, sequences):
    schedule = clustered(order, seed=p.random_seed, sequences=sequences)
    assert_matches(replace(p, proj_size=0), schedule, tolerance=2 * TOLERANCE[p.dtype])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": torch.float64}, "clusters have no float64"),
        ({"hidden_size": 513}, "the recurrent weights do not fit a cluster"),
    ],
)
def test_fp32_clusters_refuse_what_they_have_not(fields, words):
    with pytest.raises(KernelError, match=f'"cluster" cannot run: {words}'):
        assert_matches(Problem(steps=1, **fields), clustered())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("hidden", "batch", "ctas", "sequences"),
    [
        (40, 8, 1, 4),
        (64, 128, 1, 4),
        (64, 1000, 1, 8),  # when all SMs have groups of eight
        (128, 50, 4, 8),
        (256, 16, 8, 8),
        (256, 240, 8, 16),  # as many groups of sixteen as run at once
        (512, 100, 16, 8),
    ],
)
def test_planner_picks_the_shape_of_fp32_clusters(hidden, batch, ctas, sequences, backward):
    best, found, stepwise = (
        plan(load("plain"), torch.float32, hidden, batch, backward=backward, algorithm=algorithm)
        for algorithm in ("auto", "cluster", "stepwise")
    )
    assert (found.algorithm, found.tensor_cores) == (2, False)
    assert (found.ctas, found.sequences) == (ctas, sequences)
    assert best.microseconds <= found.microseconds < stepwise.microseconds


# ---- the race checker and the address sanitizer ----


@pytest.mark.parametrize("order", ["random", "block_down"])
@pytest.mark.parametrize(
    ("ctas", "units", "sequences"), [(1, 64, 4), (1, 64, 16), (2, 32, 16), (4, 32, 16)]
)
def test_no_races_in_fp32_clusters(ctas, units, sequences, order):
    p = Problem(hidden_size=57, batch=11, steps=5, packed=True, bidirectional=True)
    schedule = clustered(order, races=True, preempt=50, ctas=ctas, units=units, sequences=sequences)
    assert_matches(p, schedule, "race")


def test_no_races_with_weights_in_shared_memory():
    p = Problem(hidden_size=136, batch=3, steps=4)
    schedule = clustered(races=True, preempt=50, ctas=8, units=32, sequences=8)
    assert_matches(p, schedule, "race")


def test_address_sanitizer_finds_nothing_in_fp32_clusters():
    sanitize(
        "from test_emulated_cluster_fp32 import clustered, replace\n"
        "p = Problem(hidden_size=60, num_layers=2, batch=10, dropout=0.5, packed=True, steps=5,\n"
        "            bidirectional=True)\n"
        "for ctas, units, n in ((1, 64, 4), (1, 64, 8), (2, 32, 16), (8, 32, 16)):\n"
        "    q = replace(p, bidirectional=ctas < 8)  # 16 CTAs are many\n"
        "    assert_matches(q, clustered(ctas=ctas, units=units, sequences=n), 'asan')\n"
        "    print('right:', ctas, n)\n",
        right=4,
    )


# ---- planted bugs ----

_TILE, _LANES = "cluster/fma_tile.cuh", "shared/lane_sums.cuh"
_FORWARD, _BACKWARD = "cluster/forward_fp32.cuh", "cluster/backward_fp32.cuh"
# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "the wrong half sent": (
        _LANES, "sums[x + kCount / 2]", "sums[x]", "sums[x + kCount / 2], distance",
    ),
    "halves not ordered": (_LANES, "sums[x] = upper ? second : first;", "sums[x] = first;"),
    "weights of a warp in one place": (
        _TILE, "thread", "thread / 32", "float4*>(in_shared) + thread)",
    ),
    "first plane taken twice": (_FORWARD, "from + p * Shape::kPlaneBytes", "from"),
    "planes of a cell not exchanged": (
        _FORWARD, "add_halves<8>(cells, kUnitLanes / 2);", "",
    ),
    "first plane of dgates taken twice": (
        _BACKWARD, "at + p * Shape::kPlaneBytes", "at",
        "multiply_plane(at + p * Shape::kPlaneBytes, sums);\n#pragma unroll\n      for (int e",
    ),
    "columns of a lane swapped": (_BACKWARD, "(kOneSum ? lane / 2 % 2 : 0)", "0"),
    "both lanes of a pair send": (_BACKWARD, "kLanes < 32 || lane % 2 == 0", "true"),
    "pairs of sequences swapped": (
        _BACKWARD, "pair += lane / (kLanes / 16) % 2 * 2;", "pair = 2 - 2 * pair;",
    ),
    "operands of one sequence": (_BACKWARD, "sequence % 4 * 4", "0", "sequence % 4 * 4;"),
}  # fmt: skip


_CTAS = "(Shape::kCtas == 2 || Shape::kCtas == 8)"
_FOUR = "(Shape::kCtas == 1 && Shape::kUnits == 64 && Shape::kSequences == 4)"
ONLY = [
    (
        "cluster/forward_pass.cuh", "if (Shape::kCtas == 1)\n",
        f"({_CTAS} && Shape::kTiles == 1) || {_FOUR}",
    ),
    (
        "cluster/backward_pass.cuh", "launch_clusters(",
        f"({_CTAS} && Shape::kGroups == 1) || {_FOUR}",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder, kinds = tmp_path_factory.mktemp("mutants"), "cluster_forward cluster_backward"
    return plant(MUTANTS, folder, types="f32", kinds=kinds, only=ONLY)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_in_the_fp32_products_is_seen(name, mutants):
    small = Problem(hidden_size=61, batch=7)
    problems = [small, Problem(hidden_size=200, batch=2, steps=2), small]
    schedules = [
        clustered(races=True, ctas=2, units=32, sequences=8),
        clustered(races=True, ctas=8, units=32, sequences=8),
        clustered(races=True, ctas=1, units=64, sequences=4),
    ]
    found = any(
        is_seen(mutants[name], "simt_checks", "shows", [p], [schedule])
        for p, schedule in zip(problems, schedules, strict=True)
    )
    assert found == (name != NO_BUG)
