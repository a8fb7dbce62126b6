"""Calls of one step on a GPU, run by the emulator: each layer is one launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, sanitize
from simt_library import ORDERS, Emulated, KernelError, Schedule, load, plan

from benchmarks.problems import Problem, make

pytestmark = NEEDED

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN = Problem(steps=1, input_size=24, hidden_size=40, batch=3)
CALLS = {
    "states": {},
    "zero states": {"states": False},
    "no bias": {"has_bias": False},
    "one of everything": {"input_size": 1, "hidden_size": 1, "batch": 1},
    "three": {"input_size": 3, "hidden_size": 3, "num_layers": 3},
    "seven": {"input_size": 7, "hidden_size": 7, "batch": 7},
    "129": {"input_size": 129, "hidden_size": 129, "batch": 1, "num_layers": 2},
    "eight sequences": {"batch": 8, "hidden_size": 72},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "index": {"index": torch.int64},
    "index of 32 bits, one sequence": {"index": torch.int32, "batch": 1},
    "packed": {"packed": True, "num_layers": 2},
    "clip": {"cell_clip": 0.3},
    "zoneout": {"zoneout_h": 0.3, "zoneout_c": 0.2, "num_layers": 2},
    "recurrent dropout": {"recurrent_dropout": 0.4},
}


def launches(p: Problem, **schedule) -> tuple[int, int]:
    """Launches and large products of the forward pass alone."""
    emulated = Emulated(load("plain"), Schedule(algorithm="auto", **schedule))
    with torch.no_grad():
        emulated.lstm(*make(p).arguments)
    return emulated.launches, emulated.products


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_step_matches_the_reference_with_its_gradients(name, dtype):
    p = replace(PLAIN, dtype=dtype, **CALLS[name])
    assert launches(p) == (p.num_layers, 0)
    assert_matches(p, Schedule(algorithm="auto"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_races_in_a_single_step(dtype, order):
    for options in ({"batch": 8}, {"index": torch.int64, "bidirectional": True, "hidden_size": 7}):
        p = replace(PLAIN, dtype=dtype, num_layers=2, **options)
        assert_matches(p, Schedule(order, races=True, preempt=20, algorithm="auto"), "race")


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 9},
        {"steps": 2},
        {"proj_size": 4},
        {"layer_norm": True},
        {"dropout": 0.5, "num_layers": 2},
    ],
    ids=str,
)
def test_other_calls_have_a_pass_of_steps(options):
    p = replace(PLAIN, **options)
    count, products = launches(p, capability=75)
    assert count > p.num_layers
    assert products > 0
    assert_matches(p, Schedule(algorithm="auto", capability=75))


def test_the_planner_takes_one_launch_whatever_else_could_run():
    for hidden in (64, 256, 512, 1024):

        def planned(batch=1, steps=1, hidden=hidden, **options):
            return plan(load("plain"), torch.bfloat16, hidden, batch, steps=steps, **options)

        assert planned().single_step
        assert b"one launch" in planned().reason
        assert not planned(steps=2).single_step
        assert not planned(batch=9).single_step
        assert not planned(backward=True).single_step


def test_a_wrong_index_is_refused():
    x = make(replace(PLAIN, index=torch.int64))
    input, *rest = x.arguments
    for wrong in (-1, PLAIN.input_size):
        with pytest.raises(KernelError, match="index out of range"):
            Emulated(load("plain"), Schedule(algorithm="auto")).lstm(
                torch.full_like(input, wrong), *rest
            )


def test_address_sanitizer_finds_nothing_in_a_single_step():
    sanitize(
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "  for options in ({}, {'index': torch.int64}, {'hidden_size': 7, 'input_size': 9}):\n"
        "    p = Problem(steps=1, dtype=dtype, num_layers=2, **options)\n"
        "    assert_matches(p, Schedule(algorithm='auto'), 'asan')\n"
        "    print('right:', options)\n",
        right=6,
    )


FILE = "stepwise/single_step.cuh"
MUTANTS = {
    "cells before the sums": (
        FILE, "__syncthreads();", "", "  __syncthreads();\n\n  const int of_cta",
    ),
    "h_0 by the stride of x": (
        FILE, "units", "args.x_stride", "layer.h0, units",
    ),
    "one row for two units": (
        FILE, "int64_t(gate) * units + unit", "int64_t(gate) * units + first",
    ),
    "one lane waits": (
        FILE, "wait_for_primary();", "if (lane == 0) wait_for_primary();",
        "    wait_for_primary();",
    ),
    "half of the columns": (FILE, "16", "8", "int with = 16"),
    "one direction for both": (FILE, "args.layer[blockIdx.z]", "args.layer[0]"),
}  # fmt: skip


ONLY = [("stepwise/step_launcher.cuh", "run_kernel(step_kernel<Shape, Step>", "kIndex == 0")]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return plant(MUTANTS, folder, kinds="stepwise cluster_backward", only=ONLY)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_in_a_single_step_is_seen(name, mutants):
    p = Problem(
        steps=1,
        input_size=200,
        hidden_size=40,
        num_layers=2,
        bidirectional=True,
        dtype=torch.bfloat16,
    )
    schedule = Schedule("random", races=True, algorithm="auto")
    assert is_seen(mutants[name], "simt_checks", "shows", [p], [schedule]) == (name != NO_BUG)
