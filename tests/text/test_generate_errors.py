"""What `generate` and `prepack` refuse: the message names the argument and what came."""

import copy

import pytest
import torch
from torch import nn

import fastlstm

LSTM, DECODER = fastlstm.LSTM(5, 4), nn.Linear(4, 5)
PRIME = torch.zeros(2, 3, dtype=torch.int64)
STATE = torch.zeros(1, 3, 4)
MISTAKES = {
    "lstm": ({"lstm": nn.GRU(5, 4)}, TypeError, "lstm must be a fastlstm.LSTM or .* got GRU"),
    "decoder": ({"decoder": None}, TypeError, "decoder must be an nn.Linear, got NoneType"),
    "bidirectional": (
        {"lstm": fastlstm.LSTM(5, 2, bidirectional=True)}, ValueError, "unidirectional",
    ),
    "sizes": ({"decoder": nn.Linear(4, 6)}, ValueError, "map 4 features to 5.* got 4 to 6"),
    "dtypes": (
        {"decoder": nn.Linear(4, 5).double()}, RuntimeError, "one dtype, got torch.float32, torch",
    ),
    "devices": ({"decoder": nn.Linear(4, 5, device="meta")}, RuntimeError, "one device"),
    "prime's type": ({"prime": PRIME.float()}, TypeError, "prime must be an int64 or int32"),
    "no tensor": ({"prime": [1]}, TypeError, "prime must be .* got list"),
    "prime's form": ({"prime": PRIME[0]}, ValueError, r"shape \(T, B\).* got \(3,\)"),
    "no prime": ({"prime": PRIME[:0]}, ValueError, "at least one step"),
    "token": ({"prime": PRIME + 5}, IndexError, "token 5, expected 0 to 4"),
    "negative": ({"prime": PRIME - 1}, IndexError, "token -1, expected 0 to 4"),
    "prime's device": ({"prime": PRIME.to("meta")}, RuntimeError, "prime must be on cpu"),
    "length": ({"length": 0}, ValueError, "length must be a whole number from 1, got 0"),
    "no length": ({"length": 2.5}, TypeError, "length must be a whole number from 1, got 2.5"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature must be .* got -1.0"),
    "nan": ({"temperature": float("nan")}, ValueError, "temperature must be"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be a whole number from 1, or None"),
    "no number": ({"top_k": 2.5}, TypeError, "top_k must be a whole number .* got 2.5"),
    "text": ({"temperature": "1"}, TypeError, "temperature must be a number .* got '1'"),
    "generator": ({"generator": 3}, TypeError, "generator must be .* got int"),
    "top_p": ({"top_p": 1.5}, ValueError, r"top_p must be a number in \(0, 1\], or None"),
    "no state": ({"hx": STATE}, TypeError, "hx must be a tuple of two tensors, got Tensor"),
    "half a state": ({"hx": (STATE, None)}, TypeError, "hx must be .* got tuple of Tensor, None"),
    "state": ({"hx": (STATE, STATE[..., :3])}, RuntimeError, r"hx\[1\] must have shape \(1, 3, 4"),
    "state's dtype": (
        {"hx": (STATE.double(), STATE)}, RuntimeError, r"hx\[0\] must be torch.float32 on cpu",
    ),
    "decoder twice": (
        {"lstm": fastlstm.prepack(LSTM, DECODER)}, TypeError, "decoder must be None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_argument(name):
    changes, error, message = MISTAKES[name]
    arguments = {"lstm": LSTM, "decoder": DECODER, "prime": PRIME, "length": 2} | changes
    with pytest.raises(error, match=message):
        fastlstm.generate(**arguments)


@pytest.mark.parametrize("name", ["weight_ih_l0", "bias_hh_l0", "weight", "bias"])
def test_a_weight_that_is_no_number_is_refused(name):
    """It would draw the same token at every temperature. A bias of -inf forbids one."""
    lstm, decoder = copy.deepcopy(LSTM), copy.deepcopy(DECODER)
    weight = getattr(decoder if name in ("weight", "bias") else lstm, name)
    with torch.no_grad():
        decoder.bias[2] = -torch.inf
        fastlstm.generate(lstm, decoder, PRIME, 2)
        weight.view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match="has a weight that is no number"):
        fastlstm.generate(lstm, decoder, PRIME, 2)


def test_prepack_refuses_what_it_cannot_store():
    with pytest.raises(ValueError, match="one of fp32, bf16, int8, got 'int4'"):
        fastlstm.prepack(LSTM, DECODER, "int4")
    with pytest.raises(
        RuntimeError, match="packed weights are for CPUs and GPUs, got a module on meta"
    ):
        fastlstm.prepack(copy.deepcopy(LSTM).to("meta"), copy.deepcopy(DECODER).to("meta"))


def test_a_direct_call_refuses_what_it_cannot_read():
    p = fastlstm.prepack(LSTM, DECODER)

    def call(prime=PRIME, h0=None, matrices=p.matrices, scales=(), hidden=4, seed=None):
        return torch.ops.fastlstm.generate(
            prime, h0, None, p.table, matrices, p.biases, list(scales), hidden, 1, 0,
            0.0, 0.0, 0.0, 2, 1.0, 0, 1.0, seed, 0,
        )  # fmt: skip

    for arguments, message in (
        ({"prime": PRIME + 5}, "token 5 is outside 0 .. 4"),
        ({"h0": STATE.double()}, "h0 must have 12 elements"),
        ({"matrices": p.matrices[:1]}, "do not fit each other"),
        ({"matrices": [p.matrices[0], p.matrices[1][:, :3]]}, "decoder must have 256"),
        ({"hidden": 20}, "table must have"),
        ({"scales": p.biases}, "have scales"),
        ({}, "drawing needs a seed"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
