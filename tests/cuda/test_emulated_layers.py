"""Layers that work at once, chunk by chunk of steps on streams of their own, run by the emulator.

Which stream's work goes first, where nothing says, is the emulator's choice (Schedule.turn).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, problems_of, sanitize
from simt_library import ORDERS, TURNS, Emulated, KernelError, Schedule, load, plan

from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make, outputs_and_gradients

pytestmark = NEEDED

BF16 = torch.bfloat16
# Stacks of one direction, three layers each where nothing else is said.
STACKS = {
    name: {"num_layers": 3, "steps": 7} | fields | {"proj_size": 0, "bidirectional": False}
    for name, fields in OPTIONS.items()
    if "projection" not in name and "both" not in name
} | {
    "cells of every step": {"num_layers": 2, "steps": 5, "cells": True, "packed": True},
    "no states": {"num_layers": 2, "states": False, "steps": 5},
}


def at_once(chunk_steps, turn="last", order="random", **more):
    """A schedule of layers that work at once; of layers in turn where chunk_steps is 0."""
    return Schedule(
        order, algorithm="cluster", allow_tf32=True, chunk_steps=chunk_steps, turn=turn, **more
    )


def results(p, schedule, variant="plain", saves=True):
    """All outputs and gradients; of a pass that saves nothing, the outputs."""
    emulated = Emulated(load(variant), schedule, saves=saves)
    if saves:
        outputs, gradients = outputs_and_gradients(emulated.lstm, make(p))
    else:
        with torch.no_grad():
            outputs, gradients = emulated.lstm(*make(p).arguments)[:3], []
    assert emulated.races == 0, emulated.first_race
    return [*outputs, *gradients]


def in_turn(p, saves=True, **more):
    return results(p, at_once(0, "issued", **more), saves=saves)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", STACKS)
def test_layers_at_once_give_the_bits_of_layers_in_turn(name):
    p = Problem(dtype=BF16, **STACKS[name])
    expected = in_turn(p)
    for chunk_steps, turn in ((2, "first"), (3, "last")):
        assert same(results(p, at_once(chunk_steps, turn)), expected), (chunk_steps, turn)


@pytest.mark.parametrize("name", ["three layers", "dropout", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_layers_at_once_match_the_reference(name, dtype):
    p = Problem(dtype=dtype, **STACKS[name])
    found = assert_matches(p, at_once(3), tolerance=2e-3 if dtype == torch.float32 else 0)
    assert same(found, in_turn(p))


@pytest.mark.parametrize("chunk_steps", [1, 4, 5, 6, 7, 100])
def test_chunks_need_not_divide_the_steps(chunk_steps):
    """One step of each chunk; a last one of two steps or one; a single chunk."""
    p = Problem(num_layers=2, steps=6, batch=9, hidden_size=33, dtype=BF16)
    assert same(results(p, at_once(chunk_steps)), in_turn(p))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_any_number_of_layers_works_at_once(layers):
    p = Problem(num_layers=layers, steps=5, dtype=BF16)
    assert same(results(p, at_once(2, "drawn")), in_turn(p))


@pytest.mark.parametrize(
    ("ctas", "units", "sequences", "hidden", "passes"),
    [
        (1, 64, 16, 40, ("cluster", "cluster")),
        (2, 64, 8, 70, ("cluster", "stepwise")),
        (2, 32, 8, 50, ("stepwise", "cluster")),
        (4, 32, 16, 100, ("cluster", "cluster")),
    ],
)
def test_every_kind_of_cluster_hands_on_its_states(ctas, units, sequences, hidden, passes):
    """One CTA and several; one group of sequences in a cluster, and two."""
    p = Problem(hidden_size=hidden, num_layers=2, batch=9, steps=3, packed=True, dtype=BF16)
    p = replace(p, zoneout_h=0.3, zoneout_c=0.2)
    schedule = at_once(2, ctas=ctas, units=units, sequences=sequences)
    schedule = replace(schedule, algorithm=passes[0], backward_algorithm=passes[1])
    assert same(results(p, schedule), results(p, replace(schedule, chunk_steps=0)))


@pytest.mark.parametrize("name", ["three layers", "packed", "every rule"])
def test_inference_at_once_gives_the_bits_of_training(name):
    p = Problem(dtype=BF16, **STACKS[name])
    kept = results(p, at_once(2), saves=False)
    assert same(kept, in_turn(p)[:3])


@settings(max_examples=10, deadline=None)
@given(
    problems_of(dtype=st.just(BF16)),
    st.sampled_from(ORDERS),
    st.sampled_from(TURNS),
    st.integers(1, 4),
)
def test_drawn_stacks_work_at_once(p, order, turn, chunk_steps):
    p = replace(p, proj_size=0, bidirectional=False)
    schedule = at_once(chunk_steps, turn, order, seed=p.random_seed)
    found = assert_matches(p, schedule, tolerance=2 * TOLERANCE[BF16])
    assert same(found, in_turn(p))


def test_a_chunk_is_one_product_and_one_launch_more():
    """Forward alone: biases and padded x; for every layer W_ih packed, and the first's product."""
    p = Problem(hidden_size=40, num_layers=3, steps=8, dtype=BF16)
    for chunks in (2, 4):
        emulated = Emulated(load("plain"), at_once(8 // chunks))
        with torch.no_grad():
            emulated.lstm(*make(p).arguments)
        assert (emulated.launches, emulated.products) == (2 + 3 + 3 * chunks, 1 + 2 * chunks)
        assert emulated.follows == 2 * chunks + 1


def test_nan_stays_in_its_sequence_from_chunk_to_chunk():
    p = Problem(hidden_size=40, num_layers=2, batch=5, steps=6, dtype=BF16)
    x = make(p)
    with torch.no_grad():
        x.input[1, 3] = torch.nan
        y = Emulated(load("plain"), at_once(2)).lstm(*x.arguments)[0]
    bad = torch.zeros(6, 5, dtype=torch.bool)
    bad[1:, 3] = True
    assert torch.equal(y.isnan().any(-1), bad)


# ---- waits ----


def damages(p, schedule, expected):
    try:
        return not same(results(p, schedule), expected)
    except KernelError:
        return True


def test_every_wait_for_another_stream_is_needed():
    """Without any single one, some order of the streams' work shows it."""
    p = Problem(num_layers=3, steps=4, dtype=BF16)
    expected = in_turn(p)
    whole = Emulated(load("plain"), at_once(2))
    outputs_and_gradients(whole.lstm, make(p))
    # In each pass two chunks of two layers wait, and the call's stream at the end.
    assert whole.follows == 2 * (2 * 2 + 1)
    for forgotten in range(whole.follows // 2):  # in both passes
        found = [damages(p, at_once(2, t, forgotten=forgotten), expected) for t in TURNS[1:]]
        assert any(found), forgotten
    assert not any(damages(p, at_once(2, turn), expected) for turn in TURNS)


@pytest.mark.parametrize("backward", [False, True])
def test_a_call_that_does_not_wait_for_its_streams_is_an_error(backward):
    p = Problem(num_layers=2, steps=4, dtype=BF16)
    last = 2  # after a wait for each of two chunks
    schedule = at_once(2, forgotten=last, backward_algorithm="stepwise")
    if backward:
        schedule = replace(schedule, algorithm="stepwise", backward_algorithm="cluster")
    with pytest.raises(KernelError, match="work that the first stream does not wait for"):
        results(p, schedule)


# ---- the race checker, the address sanitizer and planted bugs ----


@pytest.mark.parametrize("name", ["packed", "every rule"])
def test_no_races_where_layers_work_at_once(name):
    p = Problem(dtype=BF16, **STACKS[name] | {"batch": 9, "hidden_size": 60, "num_layers": 2})
    schedule = at_once(3, "drawn", races=True, preempt=50, backward_algorithm="cluster")
    results(p, schedule, "race")
    results(p, replace(schedule, algorithm="stepwise", ctas=2, units=32, sequences=16), "race")


def test_address_sanitizer_finds_nothing_where_layers_work_at_once():
    sanitize(
        "from test_emulated_layers import at_once\n"
        "p = Problem(hidden_size=33, num_layers=3, batch=10, dropout=0.5, dtype=torch.bfloat16,\n"
        "            packed=True, steps=5)\n"
        "for turn in ('first', 'last'):\n"
        "  assert_matches(p, at_once(2, turn), 'asan')\n"
        "  print('right:', turn)\n",
        right=2,
    )


_FORWARD, _BACKWARD = "cluster/forward_pass.cuh", "cluster/backward.cuh"
# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "c begins anew": (_FORWARD, "      result.c_before = c_[layer];\n", ""),
    "one c for all layers": (
        _FORWARD, "if (steps.end < p_.steps) result.c_after = c_[layer];",
        "if (steps.end < p_.steps) result.c_after = c_[0];",
    ),
    "sums not waited for at the end": (
        _BACKWARD, "wait(cta.arrived(g, last), unsigned(last + 1) / 2 % 2, args.limit);", "",
    ),
    "the last step of a chunk sends nothing": (
        _BACKWARD, "s < exchanges[g]", "s + 1 < cta.length[g]", "if (s < exchanges[g]) product",
    ),
    "sums of the chunk before are those of another buffer": (
        _BACKWARD, "cta.shared + cta.sums_at(g, -1) + places.sum",
        "cta.shared + cta.sums_at(g, 0) + places.sum",
    ),
}  # fmt: skip


ONLY = [
    ("cluster/forward_pass.cuh", "if (Shape::kCtas == 1)\n", "Shape::kCtas == 2"),
    ("cluster/backward_pass.cuh", "launch_clusters(", "Shape::kCtas == 2"),
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder, kinds = tmp_path_factory.mktemp("mutants"), "stepwise cluster_forward cluster_backward"
    return plant(MUTANTS, folder, kinds=kinds, only=ONLY)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_where_states_are_handed_on_is_seen(name, mutants):
    p = Problem(hidden_size=60, num_layers=2, batch=5, steps=4, dtype=BF16)
    checked = {"races": True, "preempt": 50, "ctas": 2, "units": 64}
    forward = at_once(2, backward_algorithm="stepwise", **checked)
    backward = replace(forward, algorithm="stepwise", backward_algorithm="cluster", units=32)
    schedules = [forward, backward]
    assert is_seen(mutants[name], "simt_checks", "shows", [p], schedules) == (name != NO_BUG)


# ---- the planner ----


@pytest.mark.parametrize("backward", [False, True])
def test_planner_lets_layers_work_at_once_only_where_that_is_worth_it(backward):
    library = load("plain")

    def chunk_steps(hidden, batch, steps, layers, **more):
        found = plan(
            library, BF16, hidden, batch, layers=layers, steps=steps, backward=backward, **more
        )
        return found.chunk_steps

    assert 16 <= chunk_steps(256, 16, 1024, 2) <= 256
    assert 0 < chunk_steps(64, 128, 200, 2) <= 100
    assert chunk_steps(256, 16, 1024, 1) == 0
    assert chunk_steps(256, 16, 1024, 2, directions=2) == 0
    assert chunk_steps(256, 16, 20, 2) == 0  # chunks would be shorter than what a launch costs
    assert chunk_steps(512, 100, 1000, 2) == 0  # one layer fills the GPU
    assert chunk_steps(256, 16, 1024, 12) == 0  # more layers than streams
    assert chunk_steps(256, 16, 1024, 2, algorithm="stepwise") == 0
    assert chunk_steps(64, 8, 1, 2) == 0


@pytest.mark.parametrize("layers", [2, 4, 8])
def test_layers_at_once_take_less_time_by_the_estimate_than_in_turn(layers):
    for backward in (False, True):
        for steps in (100, 1000, 10_000):
            one, all_ = (
                plan(load("plain"), BF16, 128, 8, steps=steps, layers=n, backward=backward)
                for n in (1, layers)
            )
            if all_.chunk_steps:
                assert one.microseconds < all_.microseconds < layers * one.microseconds / 1.15
            else:
                assert all_.microseconds == pytest.approx(layers * one.microseconds)
