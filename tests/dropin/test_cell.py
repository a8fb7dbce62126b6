"""LSTMCell is nn.LSTMCell in outputs, gradients, parameters and errors, and takes indices."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm


def cells(*sizes, **options):
    theirs, ours = nn.LSTMCell(*sizes, **options), fastlstm.LSTMCell(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outcome(cell, x, hx):
    leaves = [x] if x.is_floating_point() else []
    leaves += [] if hx is None else list(hx)
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    given = list(leaves)
    x = given.pop(0) if x.is_floating_point() else x
    h, c = cell(x, tuple(given) if hx is not None else None)
    loss = (h * torch.linspace(1, 2, h.numel()).view_as(h)).sum() + c.square().sum()
    return [h, c, *torch.autograd.grad(loss, [*leaves, *cell.parameters()])]


@settings(max_examples=40, deadline=None)
@given(
    input_size=st.sampled_from([1, 3, 7, 129]),
    hidden_size=st.sampled_from([1, 3, 7, 129]),
    batch=st.sampled_from([None, 0, 1, 2, 5]),
    bias=st.booleans(),
    with_state=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_nn_lstm_cell(input_size, hidden_size, batch, bias, with_state, dtype):
    theirs, ours = cells(input_size, hidden_size, bias, dtype=dtype)
    rows = () if batch is None else (batch,)
    x = torch.randn(*rows, input_size, dtype=dtype)
    hx = None
    if with_state:
        hx = tuple(torch.randn(*rows, hidden_size, dtype=dtype) for _ in range(2))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(outcome(ours, x, hx), outcome(theirs, x, hx), **tolerance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("batched", [True, False])
def test_indices_equal_one_hot_rows(batched, dtype):
    theirs, ours = cells(7, 5, dtype=torch.float64)
    x = torch.tensor([3, 0, 3] if batched else 6, dtype=dtype)
    hx = tuple(torch.randn(*x.shape, 5, dtype=torch.float64) for _ in range(2))
    found = outcome(ours, x, hx)
    expected = outcome(theirs, F.one_hot(x.long(), 7).double(), hx)
    del expected[2]  # the gradient of the rows
    torch.testing.assert_close(found, expected)


def test_a_loop_of_cells_equals_the_module():
    lstm, cell = fastlstm.LSTM(3, 5), fastlstm.LSTMCell(3, 5)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in lstm.state_dict().items()})
    x, hx, steps = torch.randn(6, 2, 3), None, []
    for row in x:
        hx = cell(row, hx)
        steps.append(hx[0])
    y, (h_n, c_n) = lstm(x)
    torch.testing.assert_close((torch.stack(steps), *hx), (y, h_n[0], c_n[0]))


@pytest.mark.parametrize("bias", [True, False])
def test_is_made_and_copied_as_nn_lstm_cell(bias):
    torch.manual_seed(3)
    theirs = nn.LSTMCell(3, 5, bias)
    torch.manual_seed(3)
    ours = fastlstm.LSTMCell(3, 5, bias)
    assert repr(ours) == f"fastlstm.{theirs!r}"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    nn.LSTMCell(3, 5, bias).load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin(x), theirs(x))
    assert ours.to("meta")(x.to("meta"))[1].shape == (2, 5)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast(lower):
    """As nn.LSTMCell on CUDA; on the CPU nn.LSTMCell answers in the wider dtype of the state."""
    ours = fastlstm.LSTMCell(3, 5)
    x, hx = torch.randn(2, 3), (torch.randn(2, 5), torch.randn(2, 5))
    with torch.autocast("cpu", lower):
        h, c = ours(x, hx)
    assert h.dtype == c.dtype == lower
    torch.testing.assert_close((h.float(), c.float()), ours(x, hx), rtol=0, atol=2e-2)


X, H = torch.zeros(2, 3), torch.zeros(2, 5)

SAME_TEXT = {
    "input 0-D": lambda m: m(torch.tensor(1.0)),
    "input 3-D": lambda m: m(X[None]),
    "input width": lambda m: m(X[:, :2]),
    "input width, hx": lambda m: m(X[:, :2], (H, H)),
    "input no tensor": lambda m: m([1.0]),
    "h of another batch": lambda m: m(X, (H[:1], H[:1])),
    "c of another batch": lambda m: m(X, (H, H[:1])),
    "h of another width": lambda m: m(X, (H[:, :4], H)),
    "c of another width": lambda m: m(X, (H, H[:, :4])),
    "h 1-D": lambda m: m(X, (H[0], H[0])),
    "h 2-D for unbatched input": lambda m: m(X[0], (H, H)),
    "h 3-D": lambda m: m(X, (H[None], H[None])),
    "c 3-D": lambda m: m(X, (H, H[None])),
    "hx of one": lambda m: m(X, (H,)),
    "hx of three": lambda m: m(X, (H, H, H)),
}

SAME_TYPE = {
    "input float64": (lambda m: m(X.double()), "got torch.float64 and torch.float32"),
    "input int16": (lambda m: m(X.short()), "got torch.int16 and torch.float32"),
    "hx float64": (lambda m: m(X, (H.double(), H.double())), "float64"),
    "hx a tensor": (lambda m: m(X, H), "hx must be a tuple of two tensors, got Tensor"),
    "hx on another device": (lambda m: m(X, (H.to("meta"), H.to("meta"))), "found.*meta"),
}


def caught(call, module):
    with pytest.raises(Exception, match=r".") as info:
        call(module)
    return info.value


@pytest.mark.parametrize("case", SAME_TEXT)
def test_errors_are_nn_lstm_cells(case):
    theirs, ours = cells(3, 5)
    expected, error = caught(SAME_TEXT[case], theirs), caught(SAME_TEXT[case], ours)
    assert type(error) is type(expected)
    if case != "input no tensor":
        assert str(error) == str(expected)


@pytest.mark.parametrize("case", SAME_TYPE)
def test_errors_are_of_nn_lstm_cells_type(case):
    call, text = SAME_TYPE[case]
    theirs, ours = cells(3, 5)
    expected = caught(call, theirs)
    with pytest.raises(type(expected), match=text):
        call(ours)


@pytest.mark.parametrize(
    ("x", "kind", "text"),
    [
        (torch.tensor([0, 3]), IndexError, "the index 3, expected 0 to 2"),
        (torch.tensor(-1), IndexError, "the index -1, expected 0 to 2"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, "integer input to be 0D or 1D, got 2D"),
    ],
)
def test_bad_indices(x, kind, text):
    with pytest.raises(kind, match=text):
        fastlstm.LSTMCell(3, 5)(x)


def test_states_may_be_detached_in_place():
    """As between the segments of a stream; views may not."""
    for cell in cells(3, 4):
        h, c = cell(torch.randn(2, 3))
        h.detach_()
        c.detach_()
        assert not h.requires_grad
        assert not c.requires_grad


def test_states_of_other_dimensions_are_refused():
    cell = fastlstm.LSTMCell(3, 5)
    with pytest.raises(RuntimeError, match=r"hidden0 has inconsistent hidden_size"):
        cell(torch.zeros(5, 3), (torch.zeros(5), torch.zeros(5)))
    with pytest.raises(RuntimeError, match=r"hx\[0\] must have as many dimensions as input"):
        cell(torch.zeros(3), (torch.zeros(5, 5), torch.zeros(5, 5)))


def test_a_weight_of_another_shape_is_refused():
    cell = fastlstm.LSTMCell(3, 5)
    cell.weight_hh = nn.Parameter(torch.zeros(20, 4))
    with pytest.raises(RuntimeError, match=r"^weight_hh must have shape \(20, 5\)"):
        cell(X)
