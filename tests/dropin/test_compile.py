"""The modules trace in one graph: torch.compile with fullgraph=True, export, fake tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

X = torch.linspace(-1, 1, 24).view(4, 2, 3).clone()  # no view: Dynamo would guard its base

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*is deprecated")  # in Dynamo


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compare(module, *args, backend="eager", **options):
    """Outputs and gradients of the compiled and of the eager module."""
    compiled = torch.compile(module, fullgraph=True, backend=backend, **options)
    results = []
    for run in (compiled, module):
        output, state = run(*args)
        y = output if isinstance(output, torch.Tensor) else output.data
        grads = torch.autograd.grad(y.square().sum() + state[1].sum(), list(module.parameters()))
        results.append((y, state, grads))
    torch.testing.assert_close(*results)
    return compiled


def weight_normed():
    return parametrizations.weight_norm(fastlstm.LSTM(3, 5), "weight_hh_l0")


STATE = torch.ones(4, 2, 5), torch.ones(4, 2, 5)
CASES = {
    "stack": lambda: (fastlstm.LSTM(3, 5, 2, bidirectional=True), X),
    "hx": lambda: (fastlstm.LSTM(3, 5, 2, bidirectional=True), X, STATE),
    "batch_first, projected": lambda: (fastlstm.LSTM(3, 5, batch_first=True, proj_size=2), X),
    "unbatched": lambda: (fastlstm.LSTM(3, 5), X[:, 0]),
    "index": lambda: (fastlstm.LSTM(3, 5), torch.tensor([[0, 1], [2, 0]])),
    "packed": lambda: (fastlstm.LSTM(3, 5), pack_padded_sequence(X, torch.tensor([4, 2]))),
    "packed unsorted, hx": lambda: (
        fastlstm.LSTM(3, 5, 2, bidirectional=True),
        pack_padded_sequence(X, torch.tensor([2, 4]), enforce_sorted=False),
        STATE,
    ),
    "parametrised": lambda: (weight_normed(), X),
    "evaluation": lambda: (fastlstm.LSTM(3, 5, 2, dropout=0.5).eval(), X),
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph(case):
    compare(*CASES[case]())


def test_one_graph_with_inductor():
    compare(*CASES["hx"](), backend="inductor")


@pytest.mark.parametrize("index", [False, True])
def test_one_graph_for_all_shapes(index):
    module = fastlstm.LSTM(3, 5, 2)
    compiled = compare(module, X.argmax(-1) if index else X, dynamic=True)
    for steps, batch in ((7, 3), (9, 5)):
        x = torch.randint(3, (steps, batch)) if index else torch.randn(steps, batch, 3)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x), module(x))


def test_dropout_is_drawn_anew_in_every_call():
    compiled = torch.compile(fastlstm.LSTM(3, 50, 2, dropout=0.5), fullgraph=True, backend="eager")
    torch.manual_seed(0)
    first, second = compiled(X)[0], compiled(X)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(compiled(X)[0], first)


def test_autocast():
    compiled = torch.compile(fastlstm.LSTM(3, 5), fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(X)[0].dtype == torch.bfloat16


def test_functional_call():
    module = fastlstm.LSTM(3, 5)
    weights = {n: p.detach() * 2 for n, p in module.named_parameters()}

    def run(weights, x):
        return functional_call(module, weights, (x,))[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(weights, X), run(weights, X))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = fastlstm.LSTMCell(3, 5)

    def forward(self, x):
        hx = None
        for i in range(x.shape[0]):
            hx = self.cell(x[i], hx)
        return hx


class Twice(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = fastlstm.LSTM(3, 3, **options)

    def forward(self, x):
        return self.lstm(*self.lstm(x))


SEVERAL_CALLS = {
    "cells": Loop,
    "twice": Twice,
    "twice, rules": lambda: Twice(cell_clip=0.5, zoneout_h=0.2).eval(),
    "in segments": lambda: fastlstm.LSTM(3, 5, checkpoint_every=1),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", SEVERAL_CALLS)
def test_several_calls_in_one_graph(case, dynamic):
    """With dynamic shapes Dynamo takes floats for variables, and loses those of a first call."""
    module = SEVERAL_CALLS[case]()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(X), module(X))


def _gradient(module, x):
    weights = {name: w.detach() for name, w in module.named_parameters()}
    return grad(lambda w: functional_call(module, w, (x,))[0].square().sum())(weights)


def _tangent(module, x):
    return jvp(lambda x: module(x)[0], (x,), (x,))


def _dual(module, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))[0])


def _samples(module, x):
    y = vmap(lambda sample: module(sample)[0], 1)(x)
    return y, torch.autograd.grad(y.square().sum(), list(module.parameters()))


@pytest.mark.parametrize("function", [_gradient, _tangent, _dual, _samples])
def test_transforms_inside_a_compiled_function(function):
    """The graph ends where the stack is called: a tangent had been zero, a gradient an error."""
    module = fastlstm.LSTM(3, 5)
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(compiled(module, X), function(module, X))


def test_samples_without_gradients_stay_in_the_graph():
    module = fastlstm.LSTM(3, 5, 2)
    with torch.no_grad():
        run = vmap(lambda sample: module(sample)[0], 1)
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X), run(X))


def test_a_graph_exported_without_gradients_may_be_called_with_them():
    module = fastlstm.LSTM(3, 5, 2)
    with torch.no_grad():
        exported = torch.export.export(module, (X,)).module()
    results = []
    for run in (exported, module):
        y, _ = run(X)
        results.append((y, torch.autograd.grad(y.square().sum(), list(run.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_length_and_batch(strict):
    module = fastlstm.LSTM(3, 5, 2).eval()
    sizes = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    exported = torch.export.export(
        module, (X,), dynamic_shapes={"input": sizes}, strict=strict
    ).module()
    for x in (X, torch.randn(7, 3, 3)):
        torch.testing.assert_close(exported(x), module(x))


def test_fake_tensors():
    with FakeTensorMode():
        module = fastlstm.LSTM(3, 5, 2, proj_size=2)
        for x in (torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.int64)):
            y, (h_n, c_n) = module(x)
            assert (y.shape, h_n.shape, c_n.shape) == ((4, 2, 2), (2, 2, 2), (2, 2, 5))
