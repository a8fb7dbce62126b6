"""Drawn calls, most of them wrong somewhere: the outcome of nn.LSTM, an answer or its error."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm
from fastlstm import functional
from fastlstm.stack import Stack

sizes = st.integers(0, 4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
shapes = st.lists(sizes, min_size=0, max_size=4)
slow = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def options(draw):
    hidden = draw(st.integers(1, 4))
    return {
        "input_size": draw(st.integers(1, 4)),
        "hidden_size": hidden,
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.integers(0, hidden - 1)),
    }


@st.composite
def tensors(draw, likely):
    """Of the likely shape, or with a dimension changed, dropped or added, or any."""
    kind = draw(st.sampled_from(["right"] * 6 + ["changed", "dropped", "added", "any"]))
    shape = list(likely)
    if kind == "changed" and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(sizes)
    elif kind == "dropped" and shape:
        del shape[draw(st.integers(0, len(shape) - 1))]
    elif kind == "added":
        shape.insert(0, draw(st.integers(1, 2)))
    elif kind == "any":
        shape = draw(shapes)
    dtype = draw(st.sampled_from([torch.float32] * 8 + [torch.float64]))
    return torch.randn(shape).to(dtype)


@st.composite
def calls(draw):
    o = draw(options())
    steps, batch = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    batched = draw(st.booleans())
    cells, out = o["num_layers"] * (1 + o["bidirectional"]), o["proj_size"] or o["hidden_size"]
    if not batched:
        input, lead = (steps, o["input_size"]), (cells,)
    else:
        first = (batch, steps) if o["batch_first"] else (steps, batch)
        input, lead = (*first, o["input_size"]), (cells, batch)
    x = draw(tensors(input))
    if draw(st.booleans()):
        return o, x, None
    return o, x, (draw(tensors((*lead, out))), draw(tensors((*lead, o["hidden_size"]))))


def outcome(module, x, hx):
    try:
        y, (h, c) = module(x, hx)
    except Exception as error:
        return error
    return y, h, c


@slow
@given(calls())
def test_a_drawn_call_ends_as_nn_lstms(call):
    given_options, x, hx = call
    theirs = nn.LSTM(**given_options)
    ours = fastlstm.LSTM(**given_options)
    ours.load_state_dict(theirs.state_dict())
    a, b = outcome(ours, x, hx), outcome(theirs, x, hx)
    if isinstance(b, Exception):
        assert isinstance(a, Exception), f"nn.LSTM raised {b!r}, ours answered"
        assert type(a) is type(b), f"{a!r}, nn.LSTM: {b!r}"
    else:
        assert not isinstance(a, Exception), f"nn.LSTM answered, ours raised {a!r}"
        for mine, other in zip(a, b, strict=True):
            torch.testing.assert_close(mine, other)


@slow
@given(st.data())
def test_a_drawn_call_of_the_function_answers_or_raises(data):
    """Anything in the place of anything: a Python error of the documented types, or numbers."""
    o = data.draw(options())
    shapes_of = Stack(
        o["input_size"], o["hidden_size"], o["num_layers"], o["bias"], o["proj_size"],
        o["bidirectional"],
    ).weight_shapes()  # fmt: skip
    weights = [data.draw(tensors(shape)) for shape in shapes_of]
    index = data.draw(st.booleans())
    x = (
        torch.randint(-1, o["input_size"] + 1, data.draw(shapes))
        if index
        else data.draw(tensors((2, 3, o["input_size"])))
    )
    batch_sizes = data.draw(
        st.sampled_from([None, None, torch.tensor([3, 3]), torch.tensor([1, 2]), torch.tensor([])])
    )
    try:
        y, (h, c) = functional.lstm(
            x, None, weights, num_layers=o["num_layers"], bias=o["bias"],
            bidirectional=o["bidirectional"], proj_size=o["proj_size"], batch_sizes=batch_sizes,
        )  # fmt: skip
    except (ValueError, RuntimeError, IndexError, TypeError):
        return
    assert all(result.isfinite().all() for result in (y, h, c))


@pytest.mark.parametrize("steps", [65_535, 65_537, 70_001])
def test_sequences_beyond_65535_steps(steps):
    theirs, ours = nn.LSTM(2, 3), fastlstm.LSTM(2, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(steps, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
