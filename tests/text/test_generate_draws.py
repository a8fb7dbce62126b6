"""Draws: the right distribution, the right survivors of the filters, natively as in torch."""

import pytest
import torch
from generation_models import make, primed, state
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastlstm
from fastlstm.generation import draw
from fastlstm.generation.draw import Draw, choose, loop, uniforms
from fastlstm.generation.generate import run


def constant(logits):
    """A model whose logits are always these."""
    lstm, decoder = fastlstm.LSTM(len(logits), 1), nn.Linear(1, len(logits))
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.copy_(torch.tensor(logits))
    return fastlstm.prepack(lstm, decoder)


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


def test_draws_follow_the_distribution():
    logits, temperature = [0.0, 1.0, 2.0, -1.0, 0.5, 0.2], 0.7
    torch.manual_seed(0)
    prime = torch.zeros(1, 64, dtype=torch.int64)
    tokens, _ = fastlstm.generate(constant(logits), None, prime, 400, temperature=temperature)
    p = (torch.tensor(logits) / temperature).softmax(-1).double()
    counts = torch.bincount(tokens.flatten(), minlength=6)
    assert chi_square(counts, p * tokens.numel()) < 25  # 5 degrees of freedom
    # Neighbours in time, and in the batch, are independent.
    for a, b in ((tokens[:-1], tokens[1:]), (tokens[:, :-1], tokens[:, 1:])):
        pairs = torch.bincount((6 * a + b).flatten(), minlength=36)
        assert chi_square(pairs, torch.outer(p, p).flatten() * a.numel()) < 85  # 35


@given(
    logits=st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    k=st.none() | st.integers(1, 9),
    p=st.none() | st.floats(1e-6, 1),
)
def test_filters_keep_the_likeliest(logits, k, p):
    x = torch.tensor([logits], dtype=torch.float32)
    kept = draw.filtered(x, k, p)[0].isfinite()
    count = int(kept.sum())
    assert count >= 1
    if not kept.all():
        assert x[0][kept].min() >= x[0][~kept].max()
    if k is not None:
        assert count <= k
    if p is None:
        assert count == min(k or len(logits), len(logits))
    elif k is None:
        probability = x[0].double().softmax(-1)
        assert probability[kept].sum() >= p - 1e-6  # enough
        assert probability[kept].sum() - probability[kept].min() <= p + 1e-6  # and no more


@given(
    logits=st.lists(st.integers(-3, 3), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 4.0]),
    k=st.none() | st.integers(1, 9),
    p=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_native_draws_are_those_of_torch(logits, temperature, k, p, seed):
    how = Draw(temperature, k, p, torch.tensor([seed]))
    prime = torch.zeros(1, 8, dtype=torch.int64)
    tokens, _ = run(constant([float(x) for x in logits]), None, prime, 5, None, how, offset=7)
    rows = torch.tensor([logits], dtype=torch.float32).expand(8, -1)
    numbers = uniforms(how, 7, 5, 8)
    expected = [choose(rows, how, None if numbers is None else numbers[j]) for j in range(5)]
    assert torch.equal(tokens, torch.stack(expected))


def test_everything_that_survives_is_drawn_and_nothing_else():
    logits = torch.linspace(-2, 2, 70)[torch.randperm(70)].tolist()
    for k, p in ((5, None), (None, 0.6), (40, 0.5), (100, 1.0)):
        how = Draw(2.0, k, p, torch.tensor([1]))
        tokens, _ = run(
            constant(logits), None, torch.zeros(1, 64, dtype=torch.int64), 100, None, how
        )
        kept = draw.filtered(torch.tensor([logits]).double() / 2, k, p)[0].isfinite()
        assert torch.equal(tokens.unique(), kept.nonzero().flatten())


def repeated(function, buffers):
    """What as_graph does, without a GPU: once for the libraries, and the buffers as they were."""
    before = [x.clone() for x in buffers]
    function()
    for x, y in zip(buffers, before, strict=True):
        x.copy_(y)
    return function


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_step_on_fixed_buffers_draws_the_text_of_the_loop(length, temperature):
    lstm, decoder = make(9, 17, 2)
    prime, how = primed(9, batch=3), Draw(temperature, 7, 0.95, torch.tensor([5]))

    def step(tokens, hx):
        output, hx = lstm(tokens, hx)
        return decoder(output[-1]), hx

    with torch.no_grad():
        for hx in (None, state(lstm, 3)):
            expected, states = loop(step, prime, length, hx, how, 4)
            tokens, found = loop(step, prime, length, hx, how, 4, repeated)
            assert torch.equal(tokens, expected)
            assert all(torch.equal(a, b) for a, b in zip(found, states, strict=True))
