"""Models with text in them, and the float64 reference of what they draw greedily."""

import copy

import torch
from torch import nn

import fastlstm


def make(vocabulary, hidden, layers=1, scale=2.0, dtype=torch.float32, **options):
    """An LSTM and its decoder, with weights large enough that the text is no constant."""
    lstm = fastlstm.LSTM(vocabulary, hidden, layers, **options).to(dtype)
    bias = options.get("bias", True)
    decoder = nn.Linear(options.get("proj_size") or hidden, vocabulary, bias=bias).to(dtype)
    with torch.no_grad():
        for p in (*lstm.parameters(), *decoder.parameters()):
            p.mul_(scale)
    return lstm, decoder


def primed(vocabulary, steps=3, batch=1):
    return torch.randint(vocabulary, (steps, batch))


def state(lstm, batch):
    out = lstm.proj_size or lstm.hidden_size
    like = lstm.weight_hh_l0.detach()
    return tuple(like.new_empty(lstm.num_layers, batch, n).uniform_(-1, 1)
                 for n in (out, lstm.hidden_size))  # fmt: skip


def reads(lstm, decoder, inputs, hx=None):
    """Logits and states of torch's own LSTM in float64 after int64 (T, B)."""
    theirs = fastlstm.to_torch(lstm, copy=True).double()
    hx = None if hx is None else tuple(x.double() for x in hx)
    with torch.no_grad():
        x = nn.functional.one_hot(inputs, lstm.input_size).double()
        output, hx = theirs(x, hx)
        return copy.deepcopy(decoder).double()(output), hx


def assert_greedy(lstm, decoder, prime, tokens, found, hx=None, tolerance=1e-5):
    """Every token was the likeliest in the float64 reference that read all before it."""
    logits, expected = reads(lstm, decoder, torch.cat((prime, tokens[:-1])), hx)
    logits = logits[len(prime) - 1 :]
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() <= tolerance * logits.abs().max()
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())
