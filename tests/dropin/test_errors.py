"""The same mistake raises the same error as nn.LSTM; what is ours alone has a clear one."""

import warnings

import pytest
import torch
from conftest import in_newer_words
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm

X = torch.zeros(4, 2, 3)
PACKED = pack_padded_sequence(X, torch.tensor([4, 2]))


def h(layers=2, batch=2, hidden=5, **kwargs):
    return torch.zeros(layers, batch, hidden, **kwargs)


def state(*args, **kwargs):
    return h(*args, **kwargs), h(*args, **kwargs)


def packed(data=PACKED.data, batch_sizes=PACKED.batch_sizes):
    return PackedSequence(data, batch_sizes)


def caught(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    return None


CONSTRUCTOR = {
    "input_size zero": ((0, 5), {}),
    "input_size float": ((3.0, 5), {}),
    "hidden_size zero": ((3, 0), {}),
    "hidden_size float": ((3, 5.0), {}),
    "num_layers zero": ((3, 5, 0), {}),
    "num_layers text": ((3, 5, "a"), {}),
    "bias int": ((3, 5, 1, 1), {}),
    "batch_first int": ((3, 5, 1, True, 0), {}),
    "dropout above one": ((3, 5), {"dropout": 1.5}),
    "dropout negative": ((3, 5), {"dropout": -0.1}),
    "dropout bool": ((3, 5), {"dropout": True}),
    "dropout text": ((3, 5), {"dropout": "a"}),
    "proj_size negative": ((3, 5), {"proj_size": -1}),
    "proj_size of hidden_size": ((3, 5), {"proj_size": 5}),
    "device unknown": ((3, 5), {"device": "nowhere"}),
    "dtype integer": ((3, 5), {"dtype": torch.int64}),
}

# Mistakes that older releases of torch let pass.
TAKEN_BEFORE = ("input_size zero", "bias int", "batch_first int")


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_constructor_errors_are_nn_lstms(case):
    args, kwargs = CONSTRUCTOR[case]
    expected = caught(nn.LSTM, *args, **kwargs)
    error = caught(fastlstm.LSTM, *args, **kwargs)
    if case in TAKEN_BEFORE and torch.__version__ < (2, 13):  # the constructor of both is torch's
        assert (error is None) is (expected is None)
    else:
        assert expected is not None
    assert (type(error), str(error)) == (type(expected), str(expected))


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((3,), {}), ((3, 5), {"cells": 1}), (range(1, 13), {})]
)
def test_constructor_arguments_are_nn_lstms(args, kwargs):
    for cls in (nn.LSTM, fastlstm.LSTM):
        with pytest.raises(TypeError, match=r"__init__\(\)"):
            cls(*args, **kwargs)


def test_dropout_of_one_layer_warns_as_nn_lstm():
    texts = []
    for cls in (nn.LSTM, fastlstm.LSTM):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as record:
            cls(3, 5, dropout=0.5)
        texts.append([str(w.message) for w in record])
    assert texts[0] == texts[1]


# Bad calls of a 2-layer module with input_size 3, hidden_size 5. Same type and same text.
SAME_TEXT = {
    "input 1-D": lambda m: m(X[0, 0]),
    "input 4-D": lambda m: m(X[None]),
    "input width": lambda m: m(X[..., :2]),
    "input width unbatched": lambda m: m(X[:, 0, :2]),
    "input float64": lambda m: m(X.double()),
    "input bfloat16": lambda m: m(X.bfloat16()),
    "input bool": lambda m: m(X.bool()),
    "input int16": lambda m: m(X.short()),
    "no steps": lambda m: m(X[:0]),
    "no steps, no batch": lambda m: m(X[:0, :0]),
    "no steps, hx": lambda m: m(X[:0], state()),
    "hx of another batch": lambda m: m(X, state(batch=3)),
    "hx of another depth": lambda m: m(X, state(layers=1)),
    "hx of another width": lambda m: m(X, state(hidden=4)),
    "c_0 of another batch": lambda m: m(X, (h(), h(batch=3))),
    "hx 2-D for batched input": lambda m: m(X, (h()[:, 0], h()[:, 0])),
    "hx 3-D for unbatched input": lambda m: m(X[:, 0], state()),
    "hx unbatched, depth": lambda m: m(X[:, 0], (h()[:1, 0], h()[:, 0])),
    "hx a 3-D tensor": lambda m: m(X, h()),
    "hx of one": lambda m: m(X, (h(),)),
    "hx of three": lambda m: m(X, (h(), h(), h())),
    "hx with None": lambda m: m(X, (h(), None)),
    "hx text": lambda m: m(X, "ab"),
    "hx on another device": lambda m: m(X, state(device="meta")),
    "input on another device": lambda m: m(X.to("meta")),
    "batch_first, hx of another batch": lambda m: m(X, state()),
    "forward without input": lambda m: m(),
}

# nn.LSTM notices these only inside its kernels: same type, but a text that names the argument.
SAME_TYPE = {
    "input no tensor": (lambda m: m([1.0, 2.0]), "'list' object has no attribute"),
    "hx float64": (lambda m: m(X, state(dtype=torch.float64)), r"hidden\[0\].*float32.*float64"),
    "c_0 float64": (lambda m: m(X, (h(), h(dtype=torch.float64))), r"hidden\[1\].*float64"),
    "hx a 4-D tensor": (lambda m: m(X, torch.stack(state())), "hx must be a tuple.*got Tensor"),
    "packed float64": (lambda m: m(packed(PACKED.data.double())), "float64.*does not match"),
    "packed int16": (lambda m: m(packed(PACKED.data.short())), "int16.*does not match"),
    "packed width": (lambda m: m(packed(PACKED.data[:, :2])), "Expected 3, got 2"),
    "packed 3-D": (lambda m: m(packed(X)), "input must have 2 dimensions, got 3"),
    "packed, hx of another batch": (lambda m: m(PACKED, state(batch=3)), r"\(2, 2, 5\).*\[2, 3"),
    "packed, hx of another depth": (lambda m: m(PACKED, state(layers=1)), r"\(2, 2, 5\).*\[1, 2"),
    "packed, hx of another width": (lambda m: m(PACKED, state(hidden=4)), r"\(2, 2, 5\).*2, 4\]"),
    "packed, c_0 of another width": (lambda m: m(PACKED, (h(), h(hidden=4))), r"hidden\[1\]"),
    "packed, hx float64": (lambda m: m(PACKED, state(dtype=torch.float64)), r"hidden\[0\].*64"),
    "batch_sizes of too many rows": (
        lambda m: m(packed(batch_sizes=torch.tensor([2, 2, 2, 2]))),
        "add up to 8, but input has 6 rows",
    ),
    "batch_sizes that increase": (
        lambda m: m(packed(batch_sizes=torch.tensor([1, 1, 2, 2]))),
        "must not increase",
    ),
    "batch_sizes int32": (
        lambda m: m(packed(batch_sizes=PACKED.batch_sizes.int())),
        "batch_sizes must be an int64 tensor on the CPU, got torch.int32",
    ),
    "bias of another size": (
        lambda m: m.__setattr__("bias_hh_l0", nn.Parameter(torch.zeros(19))) or m(X),
        r"bias_hh_l0 must have shape \(20,\), got \(19,\)",
    ),
    "weight float64": (
        lambda m: m.__setattr__("weight_hh_l1", nn.Parameter(m.weight_hh_l1.double())) or m(X),
        "weight_hh_l1.*float64",
    ),
    "weight on another device": (
        lambda m: m.__setattr__("weight_hh_l1", nn.Parameter(m.weight_hh_l1.to("meta"))) or m(X),
        "found input tensor at cpu and parameter tensor at meta",
    ),
}


@pytest.mark.parametrize("case", SAME_TEXT)
def test_forward_errors_are_nn_lstms(case, twins):
    theirs, ours = twins(3, 5, 2, batch_first="batch_first" in case)
    expected, error = (caught(SAME_TEXT[case], m) for m in (theirs, ours))
    assert expected is not None
    assert type(error) is type(expected)
    assert str(error) == in_newer_words(str(expected))


@pytest.mark.parametrize("case", SAME_TYPE)
def test_forward_errors_are_of_nn_lstms_type(case, twins):
    call, text = SAME_TYPE[case]
    theirs, ours = twins(3, 5, 2)
    expected = caught(call, theirs)
    assert expected is not None
    with pytest.raises(type(expected), match=text) as info:
        call(ours)
    assert info.type is type(expected)
    assert "\n" not in str(info.value)


# nn.LSTM computes something from these, or fails with a text of its own.
OURS = {
    "weight of another size": (
        lambda m: m.__setattr__("weight_hh_l0", nn.Parameter(torch.zeros(20, 4))) or m(X),
        RuntimeError,
        r"weight_hh_l0 must have shape \(20, 5\), got \(20, 4\)",
    ),
    "weight deleted": (
        lambda m: m.__delattr__("weight_hh_l0") or m(X),
        AttributeError,
        "weight_hh_l0",
    ),
    "batch_sizes of too few rows": (
        lambda m: m(packed(batch_sizes=torch.tensor([2, 2]))),
        RuntimeError,
        "add up to 4, but input has 6 rows",
    ),
    "batch_sizes negative": (
        lambda m: m(packed(batch_sizes=torch.tensor([4, 4, -2]))),
        RuntimeError,
        "must be positive",
    ),
    "batch_sizes empty": (
        lambda m: m(packed(batch_sizes=torch.tensor([], dtype=torch.int64))),
        RuntimeError,
        "Expected sequence length to be larger than 0 in RNN",
    ),
    "batch_sizes 2-D": (
        lambda m: m(packed(batch_sizes=torch.tensor([[2, 2, 1, 1]]))),
        RuntimeError,
        "batch_sizes must be 1-D, got 2-D",
    ),
    "unsorted, hx of another batch": (
        lambda m: m(
            pack_padded_sequence(X, torch.tensor([2, 4]), enforce_sorted=False), state(batch=3)
        ),
        RuntimeError,
        r"Expected hidden\[0\] size \(2, 2, 5\), got \[2, 3, 5\]",
    ),
    "index 0-D": (
        lambda m: m(torch.tensor(1)),
        ValueError,
        "LSTM: Expected integer input to be 1D or 2D, got 0D instead",
    ),
    "index 3-D": (
        lambda m: m(X.long()),
        ValueError,
        "LSTM: Expected integer input to be 1D or 2D, got 3D instead",
    ),
    "packed index 2-D": (
        lambda m: m(packed(PACKED.data.long())),
        RuntimeError,
        "input must have 1 dimensions, got 2",
    ),
    "index too large": (
        lambda m: m(torch.tensor([[0, 1], [2, 3]])),
        IndexError,
        "input holds the index 3, expected 0 to 2",
    ),
    "index negative": (
        lambda m: m(torch.tensor([[0, 1], [-2, 0]], dtype=torch.int32)),
        IndexError,
        "input holds the index -2, expected 0 to 2",
    ),
    "index alone too large": (lambda m: m(torch.tensor([[3]])), IndexError, "the index 3"),
    "packed index too large": (
        lambda m: m(packed(torch.tensor([0, 1, 2, 7, 0, 0]))),
        IndexError,
        "the index 7",
    ),
    "index without steps": (
        lambda m: m(torch.zeros(0, 2, dtype=torch.int64)),
        RuntimeError,
        "Expected sequence length to be larger than 0 in RNN",
    ),
    "index, hx of another batch": (
        lambda m: m(X[..., 0].long(), state(batch=3)),
        RuntimeError,
        r"Expected hidden\[0\] size \(2, 2, 5\), got \[2, 3, 5\]",
    ),
    "no tensor": (
        lambda m: m(X.numpy()),
        AttributeError,
        "input should be a Tensor: 'ndarray' object has no attribute 'dim'",
    ),
    "dropout set out of range": (
        lambda m: m.__setattr__("dropout", 2.0) or m(X),
        ValueError,
        "dropout should be a number in range",
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_errors_of_our_own(case, twins):
    call, kind, text = OURS[case]
    _, ours = twins(3, 5, 2)
    with pytest.raises(kind, match=text) as info:
        call(ours)
    assert info.type is kind


def test_good_calls_neither_raise_nor_warn(twins):
    _, ours = twins(3, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (X, X[:, 0], PACKED, X[..., 0].long(), X[:, 0, 0].int(), X[:, :0]):
            ours(x)


def test_checks_of_nn_lstm_can_be_called(twins):
    for m in twins(3, 6, 2, proj_size=4, batch_first=True):
        x = torch.zeros(7, 5, 3)
        assert m.get_expected_hidden_size(x, None) == (2, 7, 4)
        assert m.get_expected_cell_size(x, None) == (2, 7, 6)
        assert m.get_expected_cell_size(x, torch.tensor([4, 2])) == (2, 4, 6)
        m.check_forward_args(x, (torch.zeros(2, 7, 4), torch.zeros(2, 7, 6)), None)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(2, 7, 6\), got"):
            m.check_forward_args(x, (torch.zeros(2, 7, 4), torch.zeros(2, 7, 4)), None)
