"""Native sampling: the module's own text, drawn as torch would draw it, however it is called."""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from generation_models import assert_greedy, make, primed, state

import fastlstm
from fastlstm.generation.draw import Draw
from fastlstm.generation.generate import _loop, _module, run
from fastlstm.generation.packed_weights import rounded

STORAGES = ("fp32", "bf16", "int8")


PROBLEMS = {
    "one unit": (2, 1, 1, 1, {}),
    "three": (5, 3, 2, 2, {}),
    "seven": (64, 7, 3, 3, {}),
    "sixteen": (65, 16, 1, 4, {}),
    "thirty-three": (130, 33, 2, 5, {}),
    "129": (65, 129, 3, 7, {}),
    "64 rows": (30, 20, 1, 64, {}),
    "no bias": (9, 33, 2, 1, {"bias": False}),
    "projection": (9, 33, 2, 3, {"proj_size": 5}),
    "large projection": (70, 129, 3, 2, {"proj_size": 100}),
    "one token": (1, 4, 1, 1, {}),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_greedy_text_is_the_modules(name, dtype, instruction_set):
    vocabulary, hidden, layers, batch, options = PROBLEMS[name]
    lstm, decoder = make(vocabulary, hidden, layers, dtype=dtype, **options)
    prime, hx = primed(vocabulary, batch=batch), state(lstm, batch)
    for given_state in (hx, None):
        tokens, found = fastlstm.generate(lstm, decoder, prime, 12, hx=given_state, temperature=0)
        assert (tokens.shape, tokens.dtype) == ((12, batch), torch.int64)
        assert {x.dtype for x in found} == {dtype}
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert_greedy(lstm, decoder, prime, tokens, found, given_state, tolerance)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_packed_weights_compute_what_they_hold(name, storage, instruction_set):
    """Against the float64 reference with the rounded weights: no error but float32's.

    Products with int8 weights read h in 16 bits.
    """
    vocabulary, hidden, layers, batch, options = PROBLEMS[name]
    lstm, decoder = make(vocabulary, hidden, layers, **options)
    packed = fastlstm.prepack(lstm, decoder, storage)
    with torch.no_grad():
        for key, p in (*lstm.named_parameters(), *decoder.named_parameters()):
            if p.dim() == 2 and key != "weight_ih_l0":
                p.copy_(rounded(p, storage))
    prime, hx = primed(vocabulary, batch=batch), state(lstm, batch)
    tokens, found = fastlstm.generate(packed, None, prime, 12, hx=hx, temperature=0)
    tolerance = 5e-5 if storage == "int8" else 1e-5
    assert_greedy(lstm, decoder, prime, tokens, found, hx, tolerance)


@pytest.mark.parametrize("options", [{}, {"proj_size": 5, "cell_clip": 0.05}], ids=str)
def test_no_text_depends_on_what_memory_held_before(options, instruction_set):
    lstm, decoder = make(9, 70, 2, **options)
    packed, prime = fastlstm.prepack(lstm, decoder), primed(9, batch=3)
    lost = tuple(torch.full_like(x, torch.nan) for x in state(lstm, 3))
    expected = fastlstm.generate(packed, None, prime, 12, temperature=0)
    fastlstm.generate(packed, None, prime, 12, hx=lost)
    found = fastlstm.generate(packed, None, prime, 12, temperature=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_integer_sums_do_not_overflow(instruction_set):
    """Every weight and every h is the largest of its row, and there are more than one sum holds."""
    lstm, decoder = make(3, 600, proj_size=520, bias=False)
    with torch.no_grad():
        for p in (*lstm.parameters(), *decoder.parameters()):
            p.zero_()
        lstm.weight_hh_l0[600:1200] = 1.0  # the forget gate is open
        decoder.weight[0], decoder.weight[1], decoder.weight[2] = 1e-3, -1e-3, 2e-3
    hx = torch.full((1, 1, 520), 30.0), torch.full((1, 1, 600), 5.0)
    packed = fastlstm.prepack(lstm, decoder, "int8")
    _, (h, c) = fastlstm.generate(packed, None, primed(3, 1), 1, hx=hx, temperature=0)
    assert torch.equal(c, hx[1])
    assert torch.equal(h, torch.zeros(1, 1, 520))


def test_int8_takes_every_state(instruction_set):
    """An infinite h saturates gates as in float32, a NaN is not lost, and tiny ones are zero."""
    lstm, decoder = make(9, 33, 2)
    with torch.no_grad():
        lstm.weight_hh_l0[:, 5:7].sign_()  # no weight there rounds to zero
    prime, (h0, c0) = primed(9, 1, batch=4), state(lstm, 4)
    h0[0, 0, 5], h0[0, 1, 6], h0[0, 2] = torch.inf, -torch.inf, 1e-38
    h0[0, 3, 32] = torch.nan
    states = []
    for storage in ("fp32", "int8"):
        packed = fastlstm.prepack(lstm, decoder, storage)
        tokens, found = fastlstm.generate(packed, None, prime, 1, hx=(h0, c0), temperature=0)
        assert ((tokens >= 0) & (tokens < 9)).all()
        states.append(torch.stack([x[0] for x in found]))  # (2, 4, 33) of the first layer
    exact, int8 = states
    assert not int8[:, :3].isnan().any()
    assert torch.allclose(int8[:, :3], exact[:, :3], atol=0.05)
    assert int8[:, 3].isnan().all()


def test_rounding_is_no_more_than_a_half_step():
    weight = torch.randn(40, 50)
    weight[7] = 0
    assert torch.equal(rounded(weight, "fp32"), weight)
    assert torch.equal(rounded(weight, "bf16"), weight.bfloat16().float())
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded(weight, "int8") - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", [Draw(0.0), Draw(1.0, 5, 0.9, torch.tensor([3]))], ids=str)
def test_a_second_call_goes_on_where_the_first_ended(storage, how):
    lstm, decoder = make(20, 33, 2)
    packed, prime = fastlstm.prepack(lstm, decoder, storage), primed(20, batch=3)
    whole, end = run(packed, None, prime, 30, None, how)
    first, hx = run(packed, None, prime, 11, None, how)
    second, hx = run(packed, None, first[-1:], 19, hx, how, offset=11)
    assert torch.equal(whole, torch.cat((first, second)))
    assert all(torch.equal(a, b) for a, b in zip(end, hx, strict=True))


def test_greedy_text_continues_through_the_public_function():
    lstm, decoder = make(20, 33, 2)
    prime = primed(20)
    whole, _ = fastlstm.generate(lstm, decoder, prime, 30, temperature=0)
    first, hx = fastlstm.generate(lstm, decoder, prime, 1, temperature=0)
    second, _ = fastlstm.generate(lstm, decoder, first[-1:], 29, hx=hx, temperature=0)
    assert torch.equal(whole, torch.cat((first, second)))


@pytest.mark.parametrize("storage", ["fp32", "int8"])
@pytest.mark.parametrize("batch", [1, 8])
def test_results_do_not_depend_on_threads(storage, batch, instruction_set):
    lstm, decoder = make(150, 129, 3, proj_size=70)
    packed, prime = fastlstm.prepack(lstm, decoder, storage), primed(150, batch=batch)
    how, before = Draw(1.0, None, None, torch.tensor([9])), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        tokens, hx = run(packed, None, prime, 40, None, how)
        results.append((tokens, *hx))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_python_threads_at_once():
    lstm, decoder = make(65, 129, 2)
    packed, how = fastlstm.prepack(lstm, decoder), Draw(1.0, None, None, torch.tensor([9]))

    def text(j):
        return run(packed, None, torch.tensor([[j]]), 200, None, how)[0]

    alone = [text(j) for j in range(4)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(text, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_fewer_threads_than_asked_do_not_hang():
    """OMP_THREAD_LIMIT=1 runs the workers of a region one after the other; a fork has no pool."""
    code = """
import os, torch, fastlstm
torch.set_num_threads(4)
lstm, decoder = fastlstm.LSTM(65, 256, 2), torch.nn.Linear(256, 65)
def text(): return fastlstm.generate(lstm, decoder, torch.tensor([[1]]), 20, temperature=0)[0]
print(text().tolist() == text().tolist(), flush=True)
child = os.fork()
if child == 0: print(len(text()), flush=True); os._exit(0)
os.waitpid(child, 0)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "OMP_THREAD_LIMIT": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert found.stdout.split() == ["True", "20"], found.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_loop_for_other_devices_draws_the_same(dtype):
    lstm, decoder = make(12, 9, 2, dtype=torch.float64, proj_size=4)
    lstm, decoder = lstm.to(dtype), decoder.to(dtype)
    prime, hx = primed(12, batch=3), state(lstm, 3)
    how = Draw(0.8, 6, 0.95, torch.tensor([2**60 + 5]))
    tokens, found = run(lstm, decoder, prime, 20, hx, how, 3)
    theirs, expected = _loop(*_module(lstm, decoder), prime, 20, hx, how, 3)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    if dtype != torch.bfloat16:  # whose states the module rounds
        assert torch.equal(tokens, theirs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_modules_compute_in_float32_and_lose_nothing_between_calls(dtype):
    lstm, decoder = make(12, 9, 2)
    lstm, decoder = lstm.to(dtype), decoder.to(dtype)
    prime, hx = primed(12, batch=2), state(lstm, 2)
    tokens, found = fastlstm.generate(lstm, decoder, prime, 9, hx=hx, temperature=0)
    assert {x.dtype for x in found} == {torch.float32}
    wide = (x.float() for x in hx)
    same, expected = fastlstm.generate(
        copy.deepcopy(lstm).float(), copy.deepcopy(decoder).float(), prime, 9,
        hx=tuple(wide), temperature=0,
    )  # fmt: skip
    assert torch.equal(tokens, same)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    fastlstm.generate(lstm, decoder, tokens[-1:], 2, hx=found)


def test_seeds():
    lstm, decoder = make(30, 8, scale=1.0)
    prime = primed(30)

    def text(generator=None):
        return fastlstm.generate(lstm, decoder, prime, 40, generator=generator)[0].tolist()

    torch.manual_seed(1)
    one, two = text(), text()
    torch.manual_seed(1)
    assert [text(), text()] == [one, two]
    assert one != two
    generator = torch.Generator().manual_seed(1)
    before = torch.get_rng_state()
    assert text(generator) == one
    fastlstm.generate(lstm, decoder, prime, 2, temperature=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_module_is_besides_does_not_matter():
    lstm, decoder = make(30, 8, 2)
    prime = primed(30, batch=2)
    expected, _ = fastlstm.generate(lstm, decoder, prime, 20, temperature=0)
    other = fastlstm.LSTM(30, 8, 2, batch_first=True, dropout=0.9)
    other.load_state_dict(lstm.state_dict())
    for module in (other, fastlstm.to_torch(lstm, copy=True)):
        found, hx = fastlstm.generate(module, decoder, prime.int(), 20, temperature=0)
        assert torch.equal(found, expected)
        assert not hx[0].requires_grad
    strided = prime.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(fastlstm.generate(lstm, decoder, strided, 20, temperature=0)[0], expected)


def test_packed_weights_are_a_copy_and_a_module_is_read_anew():
    lstm, decoder = make(30, 8, 2)
    packed, prime = fastlstm.prepack(lstm, decoder), primed(30)
    before, (h, _) = fastlstm.generate(packed, None, prime, 20, temperature=0)
    lstm.weight_hh_l1.data.mul_(1.5)  # which no version counter sees
    same, (h_same, _) = fastlstm.generate(packed, None, prime, 20, temperature=0)
    assert torch.equal(before, same)
    assert torch.equal(h, h_same)
    assert not torch.equal(h, fastlstm.generate(lstm, decoder, prime, 20, temperature=0)[1][0])
    again, _ = fastlstm.generate(pickle.loads(pickle.dumps(packed)), None, prime, 20, temperature=0)
    assert torch.equal(before, again)


def test_quantised_weights_are_smaller():
    lstm, decoder = make(16, 128, 2)
    sizes = [fastlstm.prepack(lstm, decoder, storage).nbytes for storage in STORAGES]
    assert sizes[0] > 1.7 * sizes[1] > 1.7 * 1.6 * sizes[2]
    assert "PackedLSTM(16, 128, num_layers=2, weights='int8'" in repr(
        fastlstm.prepack(lstm, decoder, "int8")
    )


def test_a_token_may_be_certain_and_no_other_weight_infinite():
    lstm, decoder = make(16, 8)
    decoder.bias.data[3] = float("inf")
    tokens, _ = fastlstm.generate(lstm, decoder, primed(16), 5, top_k=3, top_p=0.5)
    assert (tokens == 3).all()
    lstm.weight_hh_l0.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        fastlstm.prepack(lstm, decoder, "int8")


def test_opcheck():
    lstm, decoder = make(6, 5, 2, proj_size=3)
    p = fastlstm.prepack(lstm, decoder, "int8")
    arguments = (primed(6), *state(lstm, 1), p.table, p.matrices, p.biases, p.scales,
                 5, 2, 3, 0.0, 0.0, 0.0, 4, 1.0, 0, 1.0, torch.tensor([1]), 0)  # fmt: skip
    torch.library.opcheck(torch.ops.fastlstm.generate.default, arguments)
