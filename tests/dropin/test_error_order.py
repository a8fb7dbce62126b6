"""Of two mistakes in one call, the one that nn.LSTM or nn.LSTMCell reports is reported."""

import itertools
import re

import pytest
import torch
from conftest import in_newer_words
from torch import nn

import fastlstm

KINDS = ("LSTM", "LSTM, unbatched", "LSTMCell", "LSTMCell, unbatched")
INPUT = dict(zip(KINDS, ((4, 2, 3), (4, 3), (2, 3), (3,)), strict=True))
STATE = dict(zip(KINDS, ((2, 2, 5), (2, 5), (2, 5), (5,)), strict=True))

# What torch's kernels say of another dtype or device, and how ours say it.
OF_KERNELS = r"get_mkldnn_dtype|mat1 and mat2 must have the same dtype|^Tensor on device"
OF_OURS = r"not the same dtype|must have the same dtype|not at the same device"


def mistakes(kind):
    """By name: what changes in the call."""
    x, state = INPUT[kind], STATE[kind]
    found = {
        "input of another width": {"input": (*x[:-1], 2)},
        "input with a further dimension": {"input": (1, *x)},
        "input without its first dimension": {"input": x[1:]},
        "input in float64": {"input dtype": torch.float64},
        "input in int16": {"input dtype": torch.int16},
        "input on another device": {"input device": "meta"},
    }
    if len(x) > 1:
        found["input of another batch"] = {"input": (*x[:-2], 7, 3)}
    if "Cell" not in kind:
        found["no steps"] = {"input": (0, *x[1:])}
        found["weight on another device"] = {"weight device": "meta"}
    for name in ("h", "c"):
        found |= {
            f"{name} of another width": {name: (*state[:-1], 4)},
            f"{name} with a further dimension": {name: (1, *state)},
            f"{name} without its first dimension": {name: state[1:]},
            f"{name} in float64": {f"{name} dtype": torch.float64},
            f"{name} on another device": {f"{name} device": "meta"},
        }
        if len(state) > 1:
            found[f"{name} of another batch"] = {name: (*state[:-2], 3, 5)}
        if len(state) > 2:
            found[f"{name} of another depth"] = {name: (1, *state[1:])}
    return found | {f"hx {form}": {"form": form} for form in ("of three", "of one", "a tensor")}


def outcome(module, kind, call):
    """The error, or None where the module answers."""

    def tensor(name, shape):
        return torch.zeros(
            call.get(name, shape),
            dtype=call.get(f"{name} dtype"),
            device=call.get(f"{name} device"),
        )

    h, c = tensor("h", STATE[kind]), tensor("c", STATE[kind])
    forms = {"of three": (h, c, c), "of one": (h,), "a tensor": h}
    if "weight device" in call:
        module.weight_hh_l1 = nn.Parameter(module.weight_hh_l1.to(call["weight device"]))
    try:
        module(tensor("input", INPUT[kind]), forms.get(call.get("form"), (h, c)))
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_mistakes_the_same_is_reported(kind):
    name = kind.partition(",")[0]
    sizes = (3, 5) if "Cell" in name else (3, 5, 2)
    pairs = [
        (a, b)
        for a, b in itertools.combinations_with_replacement(mistakes(kind), 2)
        if a == b or not mistakes(kind)[a].keys() & mistakes(kind)[b].keys()
    ]
    assert len(pairs) > 150
    others = []
    for a, b in pairs:
        call = mistakes(kind)[a] | mistakes(kind)[b]
        expected = outcome(getattr(nn, name)(*sizes), kind, call)
        error = outcome(getattr(fastlstm, name)(*sizes), kind, call)
        if "Cell" in kind and expected is None and "c in float64" in (a, b):
            continue  # nn.LSTMCell answers in the wider dtype
        said, text = in_newer_words(str(expected)), str(error)
        if re.search(OF_KERNELS, said):
            same = re.search(OF_OURS, text) is not None
        elif "lstm_cell(): argument 'hx'" in said:
            same = "hx must be a tuple" in text
        else:
            same = text == said
        if type(error) is not type(expected) or not same:
            others.append(f"{a}, {b}: {error!r}, and torch {expected!r}")
    assert others == []
