"""An integer input means one-hot rows: same outputs and gradients as the rows themselves."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

OPTIONS = [
    dict(zip(("num_layers", "bias", "proj_size", "bidirectional", "batch_first"), x, strict=True))
    for x in itertools.product((1, 2), (True, False), (0, 2), (False, True), (False, True))
]


def one_hot(input, width, dtype):
    if isinstance(input, PackedSequence):
        return input._replace(data=one_hot(input.data, width, dtype))
    return F.one_hot(input.long(), width).to(dtype)


def compare(module, theirs, input, outcome, assert_close, tolerance):
    rows = one_hot(input, module.input_size, module.weight_ih_l0.dtype)
    expected = outcome(theirs, rows)
    expected.pop("grad input")
    assert_close(outcome(module, input), expected, tolerance)


@pytest.mark.parametrize("form", ["batched", "unbatched", "packed sorted", "packed unsorted"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_nn_lstm_on_one_hot_rows(options, form, twins, outcome, assert_close):
    theirs, ours = twins(11, 5, **options, dtype=torch.float64)
    x = torch.randint(11, (6, 4))
    if form == "unbatched":
        x = x[:, 0]
    elif form == "batched" and ours.batch_first:
        x = x.t()
    elif form == "packed sorted":
        x = pack_padded_sequence(x, torch.tensor([6, 4, 4, 1]))
    elif form == "packed unsorted":
        x = pack_padded_sequence(x, torch.tensor([4, 1, 6, 4]), enforce_sorted=False)
    compare(ours, theirs, x, outcome, assert_close, 1e-10)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_vocabulary_and_shape(data, twins, outcome, assert_close):
    width = data.draw(st.sampled_from([1, 2, 3, 65, 256, 1000]), "input_size")
    theirs, ours = twins(width, data.draw(st.integers(1, 33), "hidden_size"), 2)
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)), "shape")
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]), "dtype")
    x = torch.randint(width, shape, dtype=dtype)
    compare(ours, theirs, x, outcome, assert_close, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_weights(dtype):
    ours = fastlstm.LSTM(7, 5, dtype=dtype)
    x = torch.randint(7, (3, 2))
    hx = (torch.ones(1, 2, 5, dtype=dtype), torch.ones(1, 2, 5, dtype=dtype))
    y, (h_n, c_n) = ours(x, hx)
    assert y.dtype == h_n.dtype == c_n.dtype == dtype
    torch.testing.assert_close(y, ours(F.one_hot(x, 7).to(dtype), hx)[0])


def test_an_unseen_index_gets_a_zero_gradient():
    ours = fastlstm.LSTM(7, 5)
    ours(torch.tensor([[0, 2], [2, 6]]))[0].sum().backward()
    seen = ours.weight_ih_l0.grad.abs().sum(0) > 0
    assert seen.tolist() == [True, False, True, False, False, False, True]


def test_strided_indices():
    ours = fastlstm.LSTM(7, 5)
    x = torch.randint(7, (8, 6))[::2, ::3]
    assert not x.is_contiguous()
    torch.testing.assert_close(ours(x), ours(x.contiguous()), rtol=0, atol=0)


def test_gradient_is_deterministic():
    ours = fastlstm.LSTM(50, 33)
    x = torch.randint(50, (40, 30))
    runs = []
    for _ in range(3):
        ours.zero_grad()
        ours(x)[0].square().sum().backward()
        runs.append(ours.weight_ih_l0.grad.clone())
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_indices_replace_an_identity_embedding():
    """The way in which a character model is written with nn.LSTM."""
    theirs = nn.Sequential(nn.Embedding.from_pretrained(torch.eye(7)), nn.LSTM(7, 5))
    x = torch.randint(7, (6, 2))
    torch.testing.assert_close(fastlstm.from_torch(theirs[1])(x), theirs(x))
