"""Up to 64 threads: how the kernels divide a layer, and more threads than cores.

What they would gain on so many cores is an estimate; here only choices and results are tested.
"""

import math

import pytest
import torch

import fastlstm
from benchmarks.cases import CPU_CASES, Case
from benchmarks.problems import Problem, make, outputs_and_gradients
from benchmarks.report.cores import THREADS, layers
from fastlstm import _C, ops

# The costs of each instruction set and the bytes of a weight.
KINDS = {"tiles": 2, "avx512": 4, "narrow": 4}
kinds = pytest.mark.parametrize(("costs", "weight_bytes"), KINDS.items(), ids=KINDS)
cases = pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
DIVIDED = [case for case in CPU_CASES if case.batch * case.steps > 8]  # others have no parts


def tuned_on_two_threads(case, costs):
    """Parts and members by the model as it was tuned, written for two threads alone."""
    cached, far, barrier = {
        "tiles": (16, 100, 960000), "avx512": (2, 16, 48000), "narrow": (2, 2, 48000),
    }[costs]  # fmt: skip
    directions, blocks = 1 + case.bidirectional, math.ceil(case.hidden_size / 16)
    found = {}
    for parts in range(min(case.batch, 2), 0, -1):
        tasks = parts * directions
        for members in range(max(1, min(2 // tasks, blocks)), 0, -1):
            weights = math.ceil(blocks / members) * 64 * case.hidden_size
            read = far if weights * KINDS[costs] > 5 << 18 else cached
            late = far // 4 if blocks * 64 * case.hidden_size * KINDS[costs] >= 8 << 20 else 0
            rate = max(read, math.ceil(case.batch / parts)) + late
            cost = math.ceil(tasks / 2) * weights * rate
            found.setdefault(cost + (members > 1) * barrier, (parts, members))
    return found[min(found)]


@kinds
@pytest.mark.parametrize("case", DIVIDED, ids=lambda case: case.name)
def test_two_threads_divide_a_layer_as_they_were_tuned_to(case, costs, weight_bytes):
    for chosen in layers(case, costs, weight_bytes, 2):
        assert (chosen["parts"], chosen["members"]) == tuned_on_two_threads(case, costs)


@kinds
@cases
def test_no_choice_has_more_threads_than_there_are(case, costs, weight_bytes):
    for threads in THREADS:
        for chosen in layers(case, costs, weight_bytes, threads):
            assert 1 <= chosen["threads"] <= threads
            assert 1 <= chosen["parts"] <= case.batch
            assert chosen["members"] == 1 or chosen["parts"] * chosen["members"] <= threads


@kinds
@cases
def test_more_threads_are_never_estimated_to_be_slower(case, costs, weight_bytes):
    """From two on: whether a second thread pays is decided by the work of the whole call."""
    for name in ("multiply_adds", "even_multiply_adds"):
        totals = [
            sum(chosen[name] for chosen in layers(case, costs, weight_bytes, threads))
            for threads in THREADS[1:]
        ]
        assert totals == sorted(totals, reverse=True)


def divided(threads, costs="avx512", hidden_size=256, batch=1, steps=100, directions=1):
    return _C.cpu_division(
        costs=costs, weight_bytes=KINDS[costs], input_size=256, hidden_size=hidden_size,
        steps=steps, batch=batch, directions=directions, threads=threads,
    )  # fmt: skip


def test_a_team_is_as_large_as_its_barrier_pays_for():
    """One sequence's step of 256 units pays for three rounds; of 64 units, for none."""
    assert divided(16)["members"] == divided(64)["members"] == 8
    assert divided(64, hidden_size=64)["members"] == 1
    assert divided(64, hidden_size=2048)["members"] > 30


def test_members_of_a_team_read_their_weights_from_their_own_caches():
    """Parts alone would read 4 MB of weights each, from a cache that all of them share."""
    chosen = divided(64, hidden_size=512, batch=100)
    share = 4 * 512 * 512 * 4 / chosen["members"]
    assert chosen["parts"] * chosen["members"] == 64
    assert share <= 5 << 18


def test_readers_divide_what_the_shared_cache_delivers():
    """Where no member's weights fit in its own cache: few parts with large teams read less."""
    few, many = (divided(n, "narrow", hidden_size=1024, batch=64) for n in (16, 64))
    assert (few["parts"], few["members"]) == (16, 1)
    assert (many["parts"], many["members"]) == (8, 8)


def test_both_directions_of_one_sequence_run_at_once():
    chosen = divided(2, directions=2)
    assert (chosen["parts"], chosen["members"], chosen["threads"]) == (1, 1, 2)


def test_few_multiply_adds_do_not_wake_every_thread():
    assert divided(64, hidden_size=32, batch=9, steps=1)["threads"] == 3


def test_unknown_costs_are_refused():
    with pytest.raises(ValueError, match="costs: expected tiles, avx512 or narrow, got mmx"):
        _C.cpu_division(
            costs="mmx", weight_bytes=4, input_size=1, hidden_size=1, steps=1, batch=1,
            directions=1, threads=1,
        )  # fmt: skip


@pytest.fixture(params=[8, 16, 32])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Problems by what 32 threads do with them.
PROBLEMS = {
    "one team": {"hidden_size": 256, "batch": 1, "steps": 9},
    "one large team": {"hidden_size": 1000, "batch": 1, "steps": 3},
    "a team for each sequence": {"hidden_size": 400, "batch": 3, "steps": 5},
    "more parts than cores": {"hidden_size": 33, "batch": 70, "steps": 9, "packed": True},
    "a projection": {
        "hidden_size": 300, "proj_size": 150, "batch": 2, "steps": 5, "bidirectional": True,
    },
    "layer normalisation": {"hidden_size": 300, "batch": 2, "steps": 5, "layer_norm": True},
    "one step": {"hidden_size": 300, "input_size": 300, "batch": 2, "steps": 1, "num_layers": 2},
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_more_threads_than_cores_give_the_bits_of_one(problem, threads):
    x = make(Problem(**problem))
    outputs, gradients = outputs_and_gradients(ops.lstm, x)
    torch.set_num_threads(1)
    same_outputs, same_gradients = outputs_and_gradients(ops.lstm, x)
    for a, b in zip(outputs + gradients, same_outputs + same_gradients, strict=True):
        assert torch.equal(a, b)


def test_teams_of_many_members_are_among_these_problems():
    largest = PROBLEMS["one large team"]
    case = Case("", 5, largest["hidden_size"], 1, largest["batch"], largest["steps"])
    ((one,), (other,)) = (layers(case, costs, 4, 32) for costs in ("avx512", "narrow"))
    assert min(one["members"], other["members"]) > 8


def test_text_drawn_by_more_threads_than_cores_is_that_of_one(threads):
    lstm, decoder = fastlstm.LSTM(65, 512, 2), torch.nn.Linear(512, 65)

    def text():
        return fastlstm.generate(lstm, decoder, torch.tensor([[1]]), 10, temperature=0)[0]

    many = text()
    torch.set_num_threads(1)
    assert torch.equal(many, text())
