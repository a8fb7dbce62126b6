"""Outputs and all gradients are nn.LSTM's, for every option, form of input and odd size."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

OPTIONS = [
    dict(zip(("num_layers", "bias", "proj_size", "bidirectional", "batch_first"), x, strict=True))
    for x in itertools.product((1, 2, 3), (True, False), (0, 2), (False, True), (False, True))
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def name(options):
    return "-".join(str(int(x)) for x in options.values())


def make_input(form, module, steps, batch, dtype):
    x = torch.randn(steps, batch, module.input_size, dtype=dtype)
    if form == "unbatched":
        return x[:, 0]
    if form == "batched":
        return x.transpose(0, 1).contiguous() if module.batch_first else x
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[batch // 2] = steps
    if form == "packed sorted":
        lengths = lengths.sort(descending=True).values
    return pack_padded_sequence(x, lengths, enforce_sorted=form == "packed sorted")


def make_state(form, module, batch, dtype):
    cells = module.num_layers * (2 if module.bidirectional else 1)
    widths = (module.proj_size or module.hidden_size, module.hidden_size)
    middle = () if form == "unbatched" else (batch,)
    return tuple(torch.randn(cells, *middle, width, dtype=dtype) for width in widths)


@pytest.mark.parametrize("given_state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed sorted", "packed unsorted"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_equals_nn_lstm_in_float64(options, form, given_state, twins, outcome, assert_close):
    theirs, ours = twins(3, 5, **options, dtype=torch.float64)
    input = make_input(form, ours, 6, 4, torch.float64)
    hx = make_state(form, ours, 4, torch.float64) if given_state else None
    assert_close(outcome(ours, input, hx), outcome(theirs, input, hx), 1e-10)


@pytest.mark.parametrize("form", ["batched", "packed unsorted"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_equals_nn_lstm_in_float32(options, form, twins, outcome, assert_close):
    theirs, ours = twins(7, 9, **options)
    input = make_input(form, ours, 5, 3, torch.float32)
    hx = make_state(form, ours, 3, torch.float32)
    assert_close(outcome(ours, input, hx), outcome(theirs, input, hx), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden_size", [1, 3, 7, 129])
@pytest.mark.parametrize("input_size", [1, 7, 129])
def test_odd_sizes(input_size, hidden_size, dtype, twins, outcome, assert_close):
    theirs, ours = twins(input_size, hidden_size, 2, bidirectional=True, dtype=dtype)
    for steps, batch in ((1, 1), (1, 7), (7, 1), (3, 7)):
        x = torch.randn(steps, batch, input_size, dtype=dtype)
        assert_close(outcome(ours, x), outcome(theirs, x), TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data, twins, outcome, assert_close):
    hidden_size = data.draw(st.integers(1, 40), "hidden_size")
    options = {
        "num_layers": data.draw(st.integers(1, 3), "num_layers"),
        "bias": data.draw(st.booleans(), "bias"),
        "proj_size": data.draw(st.integers(0, min(hidden_size - 1, 5)), "proj_size"),
        "bidirectional": data.draw(st.booleans(), "bidirectional"),
        "batch_first": data.draw(st.booleans(), "batch_first"),
    }
    form = data.draw(
        st.sampled_from(["batched", "unbatched", "packed sorted", "packed unsorted"]), "form"
    )
    steps = data.draw(st.integers(1, 9), "steps")
    batch = data.draw(st.integers(1, 9), "batch")
    theirs, ours = twins(
        data.draw(st.integers(1, 40), "input_size"), hidden_size, **options, dtype=torch.float64
    )
    input = make_input(form, ours, steps, batch, torch.float64)
    hx = None
    if data.draw(st.booleans(), "hx"):
        hx = make_state(form, ours, batch, torch.float64)
    assert_close(outcome(ours, input, hx), outcome(theirs, input, hx), 1e-10)


def test_unsorted_packed_sequence_keeps_its_order(twins):
    theirs, ours = twins(3, 5, 2)
    x, lengths = torch.randn(6, 4, 3), torch.tensor([2, 6, 1, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, (expected_h, _) = theirs(packed)
    output, (h_n, _) = ours(packed)
    assert type(output) is type(expected)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, field), getattr(expected, field))
    padded, found_lengths = pad_packed_sequence(output)
    assert torch.equal(found_lengths, lengths)
    torch.testing.assert_close(padded, pad_packed_sequence(expected)[0])
    torch.testing.assert_close(h_n, expected_h)
    # Each sequence as if it had come alone.
    alone = ours(x[:2, 0])[0]
    torch.testing.assert_close(padded[:2, 0], alone)


@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(batch_first, twins, outcome, assert_close):
    theirs, ours = twins(3, 5, 2, batch_first=batch_first)
    x = torch.randn(0, 4, 3) if batch_first else torch.randn(4, 0, 3)
    result = outcome(ours, x)
    assert_close(result, outcome(theirs, x), 0)
    assert not result["grad weight_hh_l1"].any()


def test_strided_input_and_states(twins, outcome, assert_close):
    theirs, ours = twins(3, 5, dtype=torch.float64)
    x = torch.randn(3, 8, 6, dtype=torch.float64).permute(2, 1, 0)[:, ::2]  # (6, 4, 3)
    hx = tuple(torch.randn(5, 4, 1, dtype=torch.float64).permute(2, 1, 0) for _ in range(2))
    assert not x.is_contiguous()
    assert not hx[0].is_contiguous()
    expected_y, expected = theirs(x, tuple(h.contiguous() for h in hx))
    y, state = ours(x, hx)
    torch.testing.assert_close((y, state), (expected_y, expected), rtol=0, atol=1e-12)
    h = torch.randn(1, 1, 5, dtype=torch.float64).expand(1, 4, 5)
    torch.testing.assert_close(ours(x, (h, h))[0], theirs(x, (h, h))[0], rtol=0, atol=1e-12)


def test_hx_may_be_a_list(twins):
    theirs, ours = twins(3, 5)
    x, hx = torch.randn(4, 2, 3), [torch.randn(1, 2, 5), torch.randn(1, 2, 5)]
    torch.testing.assert_close(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("form", ["batched", "batch_first", "unbatched"])
def test_memory_layout_of_the_results(form, twins):
    theirs, ours = twins(3, 5, 2, batch_first=form == "batch_first")
    x = torch.randn(4, 3) if form == "unbatched" else torch.randn(4, 2, 3)
    (y, state), (expected_y, expected) = ours(x), theirs(x)
    assert y.stride() == expected_y.stride()
    assert [h.stride() for h in state] == [h.stride() for h in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_nn_lstm(dtype, twins):
    theirs, ours = twins(20, 30, 2, bidirectional=True, dtype=dtype)
    exact, _ = twins(20, 30, 2, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(11, 5, 20).to(dtype)
    truth = exact(x.double())[0]
    y = ours(x)[0]
    assert y.dtype == dtype
    error, their_error = (y - truth).norm(), (theirs(x)[0] - truth).norm()
    assert error <= 1.5 * their_error
    assert error <= 1e-2 * truth.norm()


def test_long_sequence(twins):
    """Beyond the 65,535 steps that some libraries end at."""
    _, ours = twins(1, 2)
    x = torch.randn(70_000, 1, 1)
    with torch.no_grad():
        y, (h_n, _) = ours(x)
        _, middle = ours(x[:35_000])
        rest, _ = ours(x[35_000:], middle)
    torch.testing.assert_close(y[-1], h_n[0], rtol=0, atol=0)
    torch.testing.assert_close(rest, y[35_000:], rtol=0, atol=1e-6)
