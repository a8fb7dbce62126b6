"""Backward in thread-block clusters, behind stepwise's forward pass, run by the emulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, problems_of, sanitize
from simt_library import ORDERS, Emulated, KernelError, Schedule, load

from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make

pytestmark = NEEDED

HALF = [torch.bfloat16, torch.float16]
# All options but projections.
CLUSTERED = {
    name: {key: value for key, value in options.items() if key != "proj_size"}
    for name, options in OPTIONS.items()
    if name not in ("projection", "wide projection")
}
# (CTAs, units of each) by which a layer's weights can be held; float32 has less room.
SHAPES = [(1, 32), (1, 64), (1, 128), (2, 32), (4, 32), (8, 32), (16, 32)]
TF32_SHAPES = [shape for shape in SHAPES if shape not in [(1, 128), (16, 32)]]
# A part of the weights is in shared memory.
STREAMED = {torch.bfloat16: (16, 48), torch.float32: (16, 32)}

RULES = {"recurrent_dropout": 0.2, "zoneout_h": 0.3, "zoneout_c": 0.4, "cell_clip": 1.0}


def clustered(order="random", shape=(0, 0), **more):
    ctas, units = shape
    return Schedule(
        order, backward_algorithm="cluster", allow_tf32=True, ctas=ctas, units=units, **more
    )


def check(p, schedule, variant="plain"):
    tolerance = 2e-3 if p.dtype == torch.float32 else 0
    return assert_matches(p, schedule, variant, tolerance)


@pytest.mark.parametrize("hidden", [7, 40])  # rows copied by element, and in bulk
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", CLUSTERED)
def test_cluster_backward_matches_the_reference(name, dtype, hidden):
    options = {**CLUSTERED[name], "hidden_size": hidden}
    check(Problem(dtype=dtype, **options), clustered())


@pytest.mark.parametrize("name", ["both directions", "three layers", "every rule"])
@pytest.mark.parametrize("hidden", [40, 65, 130])
def test_both_passes_in_clusters(name, hidden):
    """In float16: a c that bfloat16 rounds across its bound has another gradient."""
    options = {**CLUSTERED[name], "hidden_size": hidden}
    schedule = replace(clustered(), algorithm="cluster")
    check(Problem(dtype=torch.float16, **options), schedule)


@pytest.mark.parametrize("sequences", [8, 16])
@pytest.mark.parametrize("hidden", [40, 43])
def test_gradient_of_the_cells_of_every_step(hidden, sequences):
    p = Problem(hidden_size=hidden, num_layers=2, batch=19, cells=True, dtype=torch.bfloat16)
    schedule = clustered(shape=(4, 32), sequences=sequences)
    check(p, schedule)
    check(replace(p, bidirectional=True, packed=True, steps=9), schedule)


@pytest.mark.parametrize(("batch", "steps"), [(1, 2), (1, 3), (9, 1), (17, 2), (17, 3)])
@pytest.mark.parametrize(("shape", "dtype"), [
    *((shape, torch.bfloat16) for shape in SHAPES),
    *((shape, torch.float32) for shape in TF32_SHAPES),
], ids=str)  # fmt: skip
def test_every_shape_of_cluster(shape, dtype, batch, steps):
    """Every unit in use, or the last CTA only in part; CTAs without a unit; groups not full."""
    ctas, units = shape
    hidden = 264 if ctas == 16 and batch > 1 else ctas * units - (steps == 2)
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, dtype=dtype)
    check(p, clustered(shape=shape, sequences=16 if batch > 8 else 8))
    if ctas == 1 and units > 32:
        check(p, clustered(shape=shape, sequences=4))


@pytest.mark.parametrize(
    ("hidden", "batch", "steps", "dtype", "more"),
    [
        (515, 1, 1, torch.bfloat16, {}),
        (520, 9, 2, torch.bfloat16, {"bidirectional": True, "packed": True}),
        (768, 5, 3, torch.float16, {"states": True, "zoneout_h": 0.3}),
        (767, 2, 7, torch.bfloat16, {}),
        (260, 1, 2, torch.float32, {}),
        (511, 3, 3, torch.float32, {"packed": True}),
        (512, 9, 7, torch.float32, {}),
    ],
)
def test_gradients_through_weights_that_are_streamed(hidden, batch, steps, dtype, more):
    """H beyond what registers hold, forward in clusters too, for stepwise would take minutes."""
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, dtype=dtype, **more)
    check(p, replace(clustered(), algorithm="cluster"))


@pytest.mark.parametrize("dtype", STREAMED, ids=str)
@pytest.mark.parametrize(("hidden", "more"), [(56, {"bidirectional": True}), (99, {"cells": True})])
def test_streamed_weights_of_few_units(hidden, more, dtype):
    """More steps than stages; most CTAs have no unit."""
    p = Problem(hidden_size=hidden, batch=11, steps=9, packed=True, dtype=dtype, **RULES, **more)
    check(p, clustered(shape=STREAMED[dtype]))


@pytest.mark.parametrize("hidden", [1, 3, 7, 129])
@pytest.mark.parametrize("steps", [1, 2, 3, 11])
def test_odd_sizes(hidden, steps):
    p = Problem(hidden_size=hidden, num_layers=2, batch=5, steps=steps, dtype=torch.float16)
    check(p, clustered())
    check(replace(p, bidirectional=True, packed=True, batch=21), clustered(sequences=16))


@pytest.mark.parametrize("shape", [(1, 64), (2, 32), (8, 32)], ids=str)
def test_packed_sequences_enter_at_their_last_step(shape):
    p = Problem(hidden_size=56, batch=30, steps=17, packed=True, dtype=torch.bfloat16)
    for bidirectional in (False, True):
        for rules in ({}, RULES):
            check(replace(p, bidirectional=bidirectional, **rules), clustered(shape=shape))


@pytest.mark.parametrize(("hidden", "units"), [(61, 64), (120, 128)])
def test_groups_of_four_and_eight_in_one_cta_give_the_same_bits(hidden, units):
    p = Problem(hidden_size=hidden, batch=11, steps=9, packed=True, dtype=torch.bfloat16, **RULES)
    runs = [check(p, clustered(shape=(1, units), sequences=n)) for n in (4, 8)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_two_groups_in_a_cluster_equal_one():
    """Bit for bit: which sequences share a cluster is no part of the arithmetic."""
    p = Problem(hidden_size=100, batch=27, steps=6, packed=True, dtype=torch.bfloat16)
    runs = [check(p, clustered(shape=(4, 32), sequences=n)) for n in (8, 16)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(1, 64), (4, 32), (8, 32)], ids=str)
def test_cluster_backward_does_not_depend_on_the_schedule(shape):
    p = Problem(hidden_size=64, num_layers=2, batch=20, steps=5, dropout=0.4, dtype=torch.bfloat16)
    runs = [
        check(p, clustered(order, seed=seed, shape=shape, sequences=16))
        for seed, order in enumerate(ORDERS)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@settings(max_examples=25, deadline=None)
@given(problems_of(dtype=st.sampled_from(HALF)), st.sampled_from(ORDERS), st.integers(0, 1))
def test_drawn_problems(p, order, groups):
    p = replace(p, proj_size=0)
    schedule = clustered(order, seed=p.random_seed, shape=(4, 32), sequences=8 + 8 * groups)
    assert_matches(p, schedule, tolerance=2 * TOLERANCE[p.dtype])


def run_with_gradient(p, gradient):
    """The gradients of all leaves, for this gradient of the output."""
    x = make(p)
    output = Emulated(load("plain"), clustered()).lstm(*x.arguments)[0]
    return torch.autograd.grad(output, x.leaves(), gradient)


def test_gradient_that_is_not_aligned():
    """A gradient two bytes off what bulk copies take: the same bits, by element."""
    p = Problem(hidden_size=40, batch=5, dtype=torch.bfloat16)
    whole = torch.randn(p.steps * p.batch * p.hidden_size + 1).to(p.dtype)
    odd = whole[1:].view(p.steps, p.batch, p.hidden_size)
    assert odd.data_ptr() % 16 != 0
    even = odd.clone()
    assert even.data_ptr() % 16 == 0
    runs = [run_with_gradient(p, gradient) for gradient in (even, odd)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("hidden", [32, 100])
def test_nan_stays_in_its_sequence(hidden):
    p = Problem(hidden_size=hidden, batch=11, steps=5, dtype=torch.bfloat16)
    gradient = torch.ones(p.steps, p.batch, p.hidden_size, dtype=p.dtype)
    gradient[3, 4, 2] = torch.nan
    of_input, of_h0, of_c0, *_ = run_with_gradient(p, gradient)
    bad = torch.zeros(p.steps, p.batch, dtype=torch.bool)
    bad[:4, 4] = True
    assert torch.equal(of_input.isnan().any(-1), bad)
    for state in (of_h0, of_c0):
        assert torch.equal(state[0].isnan().any(-1), bad[0])


@pytest.mark.parametrize(("options", "why"), [
    ({"proj_size": 3}, "clusters have no projection"),
    ({"layer_norm": True}, "clusters have no layer normalisation"),
    ({"hidden_size": 769}, "the recurrent weights do not fit a cluster"),
])  # fmt: skip
def test_clusters_refuse_what_they_have_not(options, why):
    with pytest.raises(KernelError, match=f'"cluster" cannot run: {why}'):
        check(Problem(steps=1, dtype=torch.bfloat16, **options), clustered())


# ---- the race checker and the address sanitizer ----


@pytest.mark.parametrize("preempt", [0, 50])
@pytest.mark.parametrize("shape", [(1, 64), (2, 32), (4, 32), (8, 32)], ids=str)
@pytest.mark.parametrize("hidden", [33, 56])
def test_no_races(hidden, shape, preempt):
    p = Problem(hidden_size=hidden, batch=11, steps=7, packed=True, bidirectional=True)
    for order in ("random", "block_down"):
        sequences = 4 if shape == (1, 64) and order == "random" else 16
        schedule = clustered(order, shape, sequences=sequences, races=True, preempt=preempt)
        assert_matches(replace(p, dtype=torch.bfloat16), schedule, "race")


@pytest.mark.parametrize("order", ["random", "block_down"])
def test_no_races_where_weights_are_streamed(order):
    p = Problem(hidden_size=99, batch=9, steps=6, packed=True, dtype=torch.bfloat16)
    schedule = clustered(order, STREAMED[p.dtype], races=True, preempt=50 * (order == "random"))
    assert_matches(p, schedule, "race")


def test_address_sanitizer_finds_nothing():
    sanitize(
        "from test_emulated_cluster_backward import clustered, replace\n"
        "for hidden in (33, 56):\n"
        "  p = Problem(hidden_size=hidden, num_layers=2, batch=18, packed=True, cells=True,\n"
        "              bidirectional=True, dropout=0.5, dtype=torch.bfloat16)\n"
        "  for shape in ((1, 64), (2, 32), (4, 32), (16, 48)):\n"
        "    one = replace(p, batch=5, num_layers=1, dropout=0.0, bidirectional=False)\n"
        "    q = one if shape == (16, 48) else p  # a group: 16 CTAs are many\n"
        "    n = 4 if shape == (1, 64) and hidden == 33 else 16\n"
        "    assert_matches(q, clustered(shape=shape, sequences=n), 'asan')\n"
        "    print('right:', hidden, shape)\n",
        right=8,
    )


# ---- planted bugs ----

KERNEL, MOVERS = "cluster/backward.cuh", "cluster/backward_movers.cuh"
PRODUCT, ALONE = "cluster/backward_product.cuh", "cluster/backward_alone.cuh"
BARRIER = "        cta_barrier(cta);\n"
AWAITED = "        wait_async<kLater>();\n"
ENTERED = "      if (s < cta.length[g]) {\n" + AWAITED
STORE = "        mover.store(g, s, stored[g]);\n"
LOAD = "      mover.load(g, s + kStages, loaded[g]);\n"
SEND = "      if (s < exchanges[g]) product.send(operands_at, 2 * g + s % 2);\n"
WAIT = "wait(cta.arrived(g, s - 1), unsigned(s) / 2 % 2, args.limit);"
# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "exchange not armed again": (
        KERNEL, "thread == 0 && s + 1 < exchanges[g]", "false",
        "thread == 0 && s + 1 < exchanges[g])",
    ),
    "armed for more bytes than come": (
        KERNEL, "arrive_expecting(cta.arrived(g, s + 1), Shape::kSumsBytes)",
        "arrive_expecting(cta.arrived(g, s + 1), Shape::kSumsBytes + 16)",
    ),
    "the exchange before the first never ends": (KERNEL, "arrive(cta.arrived(g, 1));", ""),
    "parity of the step before": (KERNEL, "unsigned(s)", "unsigned(s + 1)", WAIT),
    "phase that does not toggle": (KERNEL, "unsigned(s) / 2 % 2", "0", WAIT),
    "one buffer of sums": (
        PRODUCT, "buffer * Shape::kSumsBytes", "buffer / 2 * 2 * Shape::kSumsBytes",
        "to_[block] + buffer * Shape::kSumsBytes",
    ),
    "sums not waited for": (KERNEL, WAIT, ""),
    "sums of a lone CTA not barred": (
        ALONE, "all_sums_there();", "", "    all_sums_there();\n    float sums",
    ),
    "cells prepared before their stage is there": (
        ALONE, "cta_barrier(cta);", "if (s + 1 < length) prepare(s + 1);\n    cta_barrier(cta);",
        "    cta_barrier(cta);\n\n",
    ),
    "product before the dgates are there": (
        KERNEL, BARRIER[2:] + SEND, SEND + BARRIER[2:],
    ),
    "one buffer of dgates": (
        MOVERS, "(2 * g + (s & 1)) * Shape::kDgatesBytes", "2 * g * Shape::kDgatesBytes",
    ),
    "dgates stored before they are there": (MOVERS, BARRIER + STORE, STORE + BARRIER),
    "stage loaded one step early": (
        MOVERS, ENTERED + BARRIER + STORE + "      }\n" + LOAD,
        ENTERED + LOAD + BARRIER + STORE + "      }\n",
    ),
    "stage not waited for": (MOVERS, "wait_async<kLater>();", "", AWAITED + BARRIER),
    "c of the step before not waited for": (
        MOVERS, "wait_async<kLater>();", "wait_async<kLater + kGroups>();", AWAITED + BARRIER,
    ),
    "rows looked up a step late": (
        MOVERS, "entry_ + move_", "entry_", "const int entry = entry_ + move_;",
    ),
    "stages not zeroed": (
        KERNEL, "make_uint4(0, 0, 0, 0)", "make_uint4(0, 0, 0, 0xffffffff)",
        "make_uint4(0, 0, 0, 0);",
    ),
    "no barrier before the first send": (
        KERNEL, "if constexpr (kCtas > 1) cluster_barrier();", "",
    ),
    "sums of another owner": (
        PRODUCT, "(owner + next / Shape::kUnits)", "(owner + 0 * next)",
    ),
    "the last step sends as well": (KERNEL, "s < exchanges[g]", "true", SEND),
}  # fmt: skip


ONLY = [
    (
        "cluster/backward_pass.cuh",
        "launch_clusters(",
        "Shape::kCtas == 2 || Shape::kUnits == 48 || Shape::kUnits == 64",
    )
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return plant(MUTANTS, folder, kinds="stepwise cluster_backward", only=ONLY)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_planted_bug_is_seen(name, mutants):
    p = Problem(hidden_size=64, batch=11, steps=11, packed=True, dtype=torch.bfloat16)
    schedules = [
        clustered(order, shape, races=True, preempt=50, seed=seed)
        for shape in ((2, 32), (1, 64))
        for seed, order in enumerate(("random", "lifo", "block_down"))
    ]
    schedules.append(clustered("random", STREAMED[p.dtype], races=True, preempt=50))
    problems = [p] if name == NO_BUG else [p, replace(p, bidirectional=True)]
    assert is_seen(mutants[name], "simt_checks", "shows", problems, schedules) == (name != NO_BUG)
