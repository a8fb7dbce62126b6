"""What surrounds the steps on a GPU, run by the emulator: launches, aligned rows, layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simt_checks import NEEDED, NORMED, assert_matches
from simt_library import Emulated, Schedule, input_part, load

from benchmarks import problems
from benchmarks.problems import OPTIONS, Problem, make
from fastlstm import reference

pytestmark = NEEDED

STEPS = 3
LIBRARY = 3  # kLibraryTile
# Training calls of one layer, and the most launches and large products that they may need beside
# their steps, forward and backward together.
CALLS = {
    "zero states": (Problem(input_size=16, hidden_size=32, states=False), 10),
    "states": (Problem(input_size=16, hidden_size=32), 12),
    "both directions": (
        Problem(input_size=16, hidden_size=32, states=False, bidirectional=True),
        14,
    ),
    "rows to pad": (Problem(input_size=65, hidden_size=32, states=False), 16),
    "index": (Problem(input_size=65, hidden_size=32, states=False, index=torch.int64), 13),
}


def run(p: Problem) -> Emulated:
    emulated = Emulated(load("plain"), Schedule())
    problems.outputs_and_gradients(emulated.lstm, make(p))
    return emulated


@pytest.mark.parametrize("name", CALLS)
def test_few_launches_surround_the_steps(name):
    p, most = CALLS[name]
    emulated = run(replace(p, dtype=torch.bfloat16, steps=STEPS))
    around = emulated.launches + emulated.products - 2 * STEPS
    assert around <= most


def test_a_training_call_in_clusters_is_at_most_twelve_launches():
    """Of one layer, with the gradient of its input, products counted as launches."""
    p = Problem(dtype=torch.bfloat16, input_size=16, hidden_size=32, states=False)
    emulated = Emulated(load("plain"), Schedule(algorithm="cluster"))
    problems.outputs_and_gradients(emulated.lstm, make(p))
    assert emulated.launches + emulated.products <= 12
    assert emulated.unaligned == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 65])
def test_large_products_read_and_write_rows_of_whole_pieces(width, dtype):
    """Whatever the input's width: from rows that are not, cuBLAS loads element by element."""
    for options in ({}, {"bidirectional": True}, {"index": torch.int64}, {"packed": True}):
        p = Problem(dtype=dtype, input_size=width, hidden_size=16, num_layers=2, **options)
        emulated = run(p)
        assert emulated.products > 0
        assert emulated.unaligned == 0


def test_gradients_of_odd_units_are_products_of_whole_pieces():
    p = Problem(dtype=torch.bfloat16, input_size=16, hidden_size=9, states=False)
    assert run(p).unaligned == 0


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_gradients_need_no_copy_of_h_where_states_are_zero(states, bidirectional):
    p = Problem(input_size=8, hidden_size=8, states=states, bidirectional=bidirectional, steps=5)
    assert_matches(p, Schedule("random"))


@pytest.mark.parametrize("name", ["index", "index, few rows", "both directions", "three layers"])
@pytest.mark.parametrize(("slots", "units"), [(1, 8), (2, 4), (3, 4), (5, 2), (1, 32)])
def test_input_part_by_slots(name, slots, units):
    """[slot][gate][unit], the last unit for those beyond it; biases are those of all cells."""
    p = Problem(**OPTIONS[name])
    x = make(p)
    directions = 1 + p.bidirectional
    per_cell = 4
    weights = [w.detach() for w in x.weights]
    if p.index is None:
        rows = x.input.reshape(-1, p.input_size).detach()
    else:
        tabled = p.input_size <= x.input.numel()
        rows = torch.eye(p.input_size)[... if tabled else x.input.reshape(-1).long()]
    starts, biases = input_part(load("plain"), x, slots, units, len(rows))
    for d in range(directions):
        w_ih = weights[d * per_cell]
        gates = (rows @ w_ih.T).unflatten(1, (4, p.hidden_size))
        padded = gates[..., torch.arange(slots * units).clamp(max=p.hidden_size - 1)]
        expected = padded.unflatten(2, (slots, units)).transpose(1, 2)
        torch.testing.assert_close(starts[d], expected)
    for cell, sums in enumerate(biases):
        b_ih, b_hh = weights[cell * per_cell + 2 : cell * per_cell + 4]
        assert torch.equal(sums, b_ih + b_hh)


@pytest.mark.parametrize("name", OPTIONS | NORMED)
def test_steps_by_the_library_match_the_reference(name):
    """A product and a kernel for the cells, in place of the step kernel; every option."""
    p = Problem(dtype=torch.bfloat16, **(OPTIONS | NORMED)[name])
    assert_matches(p, Schedule("random", tile=LIBRARY))


def test_a_step_by_the_library_is_a_product_a_direction_and_one_kernel():
    p = Problem(hidden_size=32, input_size=16, dtype=torch.bfloat16, bidirectional=True)
    calls = []
    for steps in (5, 6):
        emulated = Emulated(load("plain"), Schedule(tile=LIBRARY))
        problems.outputs_and_gradients(emulated.lstm, make(replace(p, steps=steps)))
        assert emulated.unaligned == 0
        calls.append((emulated.launches, emulated.products))
    (launches, products), (more_launches, more_products) = calls
    assert more_launches - launches == 2  # forward and backward
    assert more_products - products == 4


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32", "f32"])
@pytest.mark.parametrize("algorithm", ["stepwise", "cluster", "grid"])
@pytest.mark.parametrize("hidden", [5, 33, 60])
def test_an_infinite_input_saturates_gates_and_no_more(hidden, algorithm, kind):
    """And h0: no later step is spoilt by units that a kernel computes and the layer has not."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(kind, torch.float32)
    x = make(Problem(hidden_size=hidden, num_layers=2, steps=4, dtype=dtype))
    with torch.no_grad():
        x.input[0, 0, 0], x.input[1, 1, 2] = torch.inf, -torch.inf
        x.h0[0, 2, 1] = torch.inf
    schedule = Schedule(algorithm=algorithm, allow_tf32=kind == "tf32")
    actual = Emulated(load("plain"), schedule).lstm(*x.arguments)
    expected = reference.lstm(*x.to(torch.float64).arguments)
    for a, b in zip(actual, expected, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.02)
