"""Graphs of models that hold our modules: ``torch.fx`` and ``torch.jit.trace``, as with nn.LSTM."""

import io

import pytest
import torch
from torch import fx, nn

import fastlstm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
]


class Model(nn.Module):
    def __init__(self, namespace):
        super().__init__()
        self.lstm = namespace.LSTM(3, 5, 2)
        self.cell = namespace.LSTMCell(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, h, c):
        y, (h, c) = self.lstm(x, (h, c))
        a, b = self.cell(y[-1])
        return self.head(a + b), h, c


def models():
    theirs, ours = Model(nn), Model(fastlstm)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def operands(steps=4, batch=2):
    return torch.randn(steps, batch, 3), torch.randn(2, batch, 5), torch.randn(2, batch, 5)


def nodes(graph):
    return [(node.op, node.name, str(node.target), str(node.args)) for node in graph.nodes]


def test_fx_makes_the_graph_that_it_makes_of_nn_lstm():
    theirs, ours = models()
    expected, found = fx.symbolic_trace(theirs), fx.symbolic_trace(ours)
    assert nodes(found.graph) == nodes(expected.graph)
    assert ("call_module", "lstm", "lstm") in [node[:3] for node in nodes(found.graph)]
    args = operands(steps=7, batch=3)
    torch.testing.assert_close(found(*args), expected(*args))
    grads = [torch.autograd.grad(m(*args)[0].sum(), m.lstm.weight_hh_l0) for m in (found, theirs)]
    torch.testing.assert_close(*grads)


def test_fx_keeps_the_options_of_a_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = fastlstm.LSTM(3, 5)

        def forward(self, x, lengths):
            y, _, cells = self.lstm(x, lengths=lengths, return_cells=True)
            return y, cells

    model = Model()
    args = torch.randn(4, 2, 3), torch.tensor([2, 4])
    torch.testing.assert_close(fx.symbolic_trace(model)(*args), model(*args))


FORMS = {
    "plain": {},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 2, "batch_first": True},
    "layer norm": {"layer_norm": True},
}


@pytest.mark.parametrize("made_with_gradients", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_trace_runs_trains_and_is_stored(form, made_with_gradients):
    lstm = fastlstm.LSTM(3, 5, **FORMS[form])
    with torch.set_grad_enabled(made_with_gradients):
        traced = torch.jit.trace(lstm, (torch.randn(4, 2, 3),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = torch.randn(7, 3, 3)  # of another length and batch
    expected, state = lstm(x)
    wanted = torch.autograd.grad(expected.square().sum() + state[1].sum(), list(lstm.parameters()))
    for module in (traced, torch.jit.load(file)):
        y, found = module(x)
        torch.testing.assert_close((y, found), (expected, state))
        grads = torch.autograd.grad(y.square().sum() + found[1].sum(), list(module.parameters()))
        torch.testing.assert_close(grads, wanted)


def test_a_trace_draws_dropout_anew():
    lstm = fastlstm.LSTM(3, 40, 2, dropout=0.5)
    x = torch.randn(4, 2, 3)
    traced = torch.jit.trace(lstm, (x,), check_trace=False)
    assert not torch.equal(traced(x)[0], traced(x)[0])


def test_a_trace_of_a_cell():
    theirs, ours = nn.LSTMCell(3, 5), fastlstm.LSTMCell(3, 5)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(2, 3), (torch.randn(2, 5), torch.randn(2, 5))
    traced = torch.jit.trace(ours, (x, hx))
    x, hx = torch.randn(4, 3), (torch.randn(4, 5), torch.randn(4, 5))
    torch.testing.assert_close(traced(x, hx), theirs(x, hx))
