"""Draws: the right distribution, the right survivors of the filters, natively as in torch."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from generation_models import make, primed, state
from hypothesis import given
from hypothesis import strategies as st

import fastlstm
from fastlstm.generation import draw
from fastlstm.generation.draw import Draw, choose, loop, noise
from fastlstm.generation.generate import _loop, _module, run
from fastlstm.generation.graphs import as_graph

CPU = torch.device("cpu")


def constant(logits):
    """A model whose logits are always these."""
    return fastlstm.prepack(*models_of(torch.tensor(logits)))


def models_of(logits):
    lstm, decoder = make(len(logits), 1, dtype=logits.dtype)
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.copy_(logits)
    return lstm, decoder


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


@pytest.mark.parametrize(("k", "p", "kept"), [(3, None, 3), (None, 0.9, 4), (4, 0.8, 3)])
def test_filtered_draws_follow_the_distribution_of_what_is_kept(k, p, kept):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.2]) / 2
    how = Draw(0.5, k, p, torch.tensor([4]))
    prime = torch.zeros(1, 64, dtype=torch.int64)
    tokens, _ = run(constant(logits.tolist()), None, prime, 400, None, how)
    counts = torch.bincount(tokens.flatten(), minlength=6)
    order = (2 * logits).double().argsort(descending=True)[:kept]
    expected = (2 * logits).double()[order].softmax(-1) * tokens.numel()
    assert counts[order].sum() == tokens.numel()
    assert chi_square(counts[order], expected) < 20  # 2 or 3 degrees of freedom


def test_noise_is_of_gumbels_distribution_and_independent():
    values = noise(torch.tensor([5]), 0, 200, 30, 50, CPU)
    tenths = ((-(-values).exp()).exp() * 10).long()  # by the distribution function
    expected = values.numel() / 10
    assert chi_square(torch.bincount(tenths.flatten(), minlength=10), expected) < 35  # 9
    for dim in range(3):  # neighbours among draws, rows and tokens
        n = values.shape[dim]
        a, b = tenths.narrow(dim, 0, n - 1), tenths.narrow(dim, 1, n - 1)
        pairs = torch.bincount((10 * a + b).flatten(), minlength=100)
        assert chi_square(pairs, a.numel() / 100) < 165  # 99
    assert values.flatten().unique().numel() == values.numel()


def extremes(count):
    """Numbers of the draws in row 0 of two tokens whose noise is the least and the most."""
    values = noise(torch.tensor([6]), 0, 200_000, 1, 2, CPU)[:, 0]
    order = values.flatten().argsort()
    return [(int(j) // 2, values[j // 2]) for j in (*order[:count], *order[-count:])]


def chosen(number, logits):
    """What draw ``number`` of that stream takes in float64."""
    how = Draw(seed=torch.tensor([6]))
    tokens, _ = run(*models_of(logits), torch.tensor([[0]]), 1, None, how, offset=number)
    return tokens.item()


def test_noise_is_exact_at_both_ends():
    for number, (first, second) in extremes(8):
        for margin in (1e-12, -1e-12):
            logits = torch.stack((second - first + margin, torch.zeros_like(first)))
            assert chosen(number, logits) == (0 if margin > 0 else 1)


def test_logits_of_minus_infinity_are_never_drawn():
    logits = [0.0, -torch.inf, 1.0, -torch.inf]
    lstm, decoder = models_of(torch.tensor(logits))
    prime = torch.zeros(1, 64, dtype=torch.int64)
    for k, p in ((None, None), (3, None), (None, 0.99)):
        how = Draw(5.0, k, p, torch.tensor([1]))
        natively, _ = run(lstm, decoder, prime, 100, None, how)
        by_steps, _ = _loop(*_module(lstm, decoder), prime, 100, None, how, 0)
        assert natively.unique().tolist() == by_steps.unique().tolist() == [0, 2]


def test_a_rows_text_does_not_depend_on_the_others():
    packed, prime = fastlstm.prepack(*make(20, 33, 2)), primed(20, batch=7)
    how = Draw(0.9, seed=torch.tensor([3]))
    whole, _ = run(packed, None, prime, 40, None, how)
    some, _ = run(packed, None, prime[:, :4].contiguous(), 40, None, how)
    assert torch.equal(whole[:, :4], some)


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
    numbers = noise(how.seed, 7, 5, 8, len(logits), CPU)
    expected = [choose(rows, how, None if temperature == 0 else x) for x in numbers]
    assert torch.equal(tokens, torch.stack(expected))


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_native_draws_of_many_tokens_are_those_of_torch(spread):
    logits = spread * torch.randn(300)
    how, prime = Draw(0.7, seed=torch.tensor([8])), torch.zeros(1, 64, dtype=torch.int64)
    tokens, _ = run(constant(logits.tolist()), None, prime, 60, None, how)
    numbers = noise(how.seed, 0, 60, 64, 300, CPU)
    assert torch.equal(
        tokens, torch.stack([choose(logits.expand(64, -1), how, x) for x in numbers])
    )


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


def test_a_graph_is_captured_on_a_stream_of_its_own_device(monkeypatch):
    """torch.cuda.graph's default stream is on the device of the process' first graph."""
    device, streams, captured = [0], [], []

    class Stream:
        def __init__(self):
            self.device = device[0]
            streams.append(self)

        def wait_stream(self, other):
            pass

    @contextmanager
    def on(index):
        before, device[0] = device[0], index
        yield
        device[0] = before

    def graph(recorded, stream=None):
        captured.append(stream)
        return nullcontext()

    default = Stream()
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: default)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    buffer = SimpleNamespace(device=1, clone=lambda: None, copy_=lambda x: None)
    calls = []
    assert as_graph(lambda: calls.append(device[0]), [buffer]) == "replay"
    assert calls == [1, 1]
    assert [stream.device for stream in captured] == [1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_step_on_fixed_buffers_draws_the_text_of_the_loop(length, temperature, monkeypatch):
    lstm, decoder = make(9, 17, 2)
    prime, how = primed(9, batch=3), Draw(temperature, 7, 0.95, torch.tensor([5]))

    def step(tokens, hx):
        output, hx = lstm(tokens, hx)
        return decoder(output[-1]), hx

    with torch.no_grad():
        for hx in (None, state(lstm, 3)):
            expected, states = loop(step, prime, length, hx, how, 4)
            for draws in (1, 4, 9):  # whose noise is computed at a time
                monkeypatch.setattr(draw._Noise, "ELEMENTS", draws * 27)
                for capture in (None, repeated):
                    tokens, found = loop(step, prime, length, hx, how, 4, capture)
                    assert torch.equal(tokens, expected)
                    assert all(torch.equal(a, b) for a, b in zip(found, states, strict=True))
