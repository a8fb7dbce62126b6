"""from_torch and to_torch exchange every LSTM of a model and lose nothing on the way."""

import copy
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastlstm

X = torch.linspace(-1, 1, 24).view(4, 2, 3)


class Model(nn.Module):
    """LSTMs at several depths, one used twice, two whose weights are tied, and a cell."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(3, 3, 2, dropout=0.25)
        self.stack = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), self.first])
        self.tied = nn.LSTM(3, 3)
        self.tied.weight_hh_l0 = self.stack[0][1].weight_hh_l0
        self.cell = nn.LSTMCell(3, 4)
        self.nothing = None
        self.register_module("empty", None)

    def forward(self, x):
        for layer in (self.first, self.stack[0], self.stack[1], self.tied):
            x = layer(x)[0]
        return self.cell(x[-1])[0]


def kinds(model):
    return [type(m) for m in model.modules()]


def gradients(model):
    model.zero_grad()
    y = model(X)
    y.square().sum().backward()
    return y, {n: p.grad for n, p in model.named_parameters()}


def test_a_model_is_converted_in_place_and_computes_the_same():
    model = Model().eval()
    names, parameters = list(model.state_dict()), list(model.parameters())
    expected = gradients(model)
    converted = fastlstm.from_torch(model)
    assert converted is model
    assert not {nn.LSTM, nn.LSTMCell} & set(kinds(model))
    assert kinds(model).count(fastlstm.LSTM) == 3
    assert kinds(model).count(fastlstm.LSTMCell) == 1
    torch.testing.assert_close(gradients(model), expected)
    assert list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model.first is model.stack[1]
    assert model.tied.weight_hh_l0 is model.stack[0][1].weight_hh_l0
    assert not any(m.training for m in model.modules())

    back = fastlstm.to_torch(model)
    assert back is model
    assert not {fastlstm.LSTM, fastlstm.LSTMCell} & set(kinds(model))
    torch.testing.assert_close(gradients(model), expected)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model.first is model.stack[1]


def test_a_copy_leaves_the_model_as_it_is():
    model = Model().eval()
    before = kinds(model)
    converted = fastlstm.from_torch(model, copy=True)
    assert converted is not model
    assert kinds(model) == before
    assert kinds(converted).count(fastlstm.LSTM) == 3
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
    assert converted.first is converted.stack[1]
    assert converted.tied.weight_hh_l0 is converted.stack[0][1].weight_hh_l0
    torch.testing.assert_close(converted(X), model(X))
    with torch.no_grad():
        converted.cell.weight_ih.zero_()
    assert model.cell.weight_ih.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 5),
        lambda: nn.LSTM(3, 5, 3, bias=False, dropout=0.5, bidirectional=True),
        lambda: nn.LSTM(3, 5, batch_first=True, proj_size=2, dtype=torch.float64),
        lambda: nn.LSTMCell(3, 5, bias=False),
        lambda: nn.LSTM(3, 5, device="meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_a_module_alone(make):
    theirs = make().eval()
    next(theirs.parameters()).requires_grad_(False)
    ours = fastlstm.from_torch(theirs)
    assert type(ours) is {nn.LSTM: fastlstm.LSTM, nn.LSTMCell: fastlstm.LSTMCell}[type(theirs)]
    assert repr(ours) == f"fastlstm.{theirs!r}"
    assert not ours.training
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p is q
    back = fastlstm.to_torch(ours)
    assert type(back) is type(theirs)
    p = next(theirs.parameters())
    x = torch.ones(4, 3, dtype=p.dtype, device=p.device)
    for a, b in zip((ours(x), back(x)), (theirs(x), theirs(x)), strict=True):
        torch.testing.assert_close(a, b)
    fresh = fastlstm.from_torch(theirs, copy=True)
    assert not {id(p) for p in fresh.parameters()} & {id(p) for p in theirs.parameters()}
    torch.testing.assert_close(fresh(x), theirs(x))


def test_an_optimizer_made_before_goes_on():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fastlstm.from_torch(model)
    before = model.first.weight_hh_l1.clone()
    gradients(model)
    optimizer.step()
    assert not torch.equal(model.first.weight_hh_l1, before)


def test_old_and_new_module_can_be_changed_apart():
    theirs = nn.LSTM(3, 5)
    ours = fastlstm.from_torch(theirs)
    expected = theirs(X)
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(20, 5))
    assert theirs.weight_hh_l0.any()
    assert theirs._flat_weights[1] is theirs.weight_hh_l0
    torch.testing.assert_close(theirs(X), expected)


def test_hooks_go_along_and_their_handles_work():
    theirs, seen = nn.LSTM(3, 5), []
    handle = theirs.register_forward_hook(lambda m, args, result: seen.append(type(m)))
    ours = fastlstm.from_torch(theirs)
    ours(X)
    assert seen == [fastlstm.LSTM]
    handle.remove()
    ours(X)
    assert len(seen) == 1


def test_parametrizations_go_along():
    model = nn.Sequential(nn.LSTM(3, 5))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    with torch.no_grad():
        expected, _ = model(X)
    fastlstm.from_torch(model)
    assert isinstance(model[0], fastlstm.LSTM)
    assert parametrize.is_parametrized(model[0], "weight_hh_l0")
    torch.testing.assert_close(model(X)[0], expected)
    model(X)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(copy.deepcopy(model)(X)[0], expected)
    fastlstm.to_torch(model)
    assert isinstance(model[0], nn.LSTM)
    torch.testing.assert_close(model(X)[0], expected)
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is nn.LSTM


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_old_style_weight_norm_goes_along():
    lstm = nn.utils.weight_norm(nn.LSTM(3, 5), "weight_hh_l0")
    expected = lstm(X)
    ours = fastlstm.from_torch(lstm)
    with torch.no_grad():
        ours.weight_hh_l0_g.mul_(2)
    torch.testing.assert_close(ours(X), lstm(X))
    assert not torch.equal(ours(X)[0], expected[0])


def test_buffers_attributes_and_inner_modules_go_along():
    lstm = nn.LSTM(3, 5)
    lstm.register_buffer("scale", torch.ones(1))
    lstm.inner = nn.LSTM(2, 2)
    lstm.note = ["kept"]
    ours = fastlstm.from_torch(nn.ModuleList([lstm]))[0]
    assert list(ours.state_dict()) == list(lstm.state_dict())
    assert type(ours.inner) is fastlstm.LSTM
    assert ours.note == ["kept"]


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class OwnMethod(nn.LSTM):
    def initial_state(self):
        return None


class OwnInit(nn.LSTM):
    """A mere preset."""

    def __init__(self, size):
        super().__init__(size, size, 2)


class Mixed(OwnMethod, OwnInit):
    pass


def test_subclasses_with_methods_of_their_own_are_left_alone():
    model = nn.ModuleList([OwnForward(3, 5), OwnMethod(3, 5), Mixed(3), OwnInit(3)])
    before = list(model)
    fastlstm.from_torch(model)
    assert list(model)[:3] == before[:3]
    assert type(model[3]) is fastlstm.LSTM
    assert fastlstm.from_torch(before[0]) is before[0]


def test_modules_with_a_replaced_forward_are_left_alone():
    lstm = nn.LSTM(3, 5)
    lstm.forward = lambda x: x
    assert fastlstm.from_torch(lstm) is lstm
    compiled = nn.LSTM(3, 5)
    compiled.compile(backend="eager")
    assert fastlstm.from_torch(compiled) is compiled


def test_subclasses_with_attributes_of_their_own_are_left_alone():
    ones = (torch.ones(1, 2, 5), torch.ones(1, 2, 5))
    preset = type("P", (nn.LSTM,), {"forward": partialmethod(nn.LSTM.forward, hx=ones)})
    for cls in (preset, type("Marked", (nn.LSTM,), {"streams": True})):
        lstm = cls(3, 5)
        assert fastlstm.from_torch(lstm) is lstm


def test_what_was_compiled_alone_is_refused():
    """It would go on to call the old module, past train() and eval() of the new one."""
    inner = nn.Sequential(nn.LSTM(3, 5))
    model = nn.Sequential(inner, torch.compile(nn.LSTM(3, 5), backend="eager"))
    for copies in (False, True):
        with pytest.raises(ValueError, match=r"an LSTM was given to torch\.compile by itself"):
            fastlstm.from_torch(model, copy=copies)
    assert type(inner[0]) is nn.LSTM
    with pytest.raises(ValueError, match="convert it first"):
        fastlstm.to_torch(torch.compile(fastlstm.LSTM(3, 5), backend="eager"))
    compiled = torch.compile(inner, backend="eager")
    fastlstm.from_torch(compiled)
    assert type(inner[0]) is fastlstm.LSTM
    x = torch.randn(4, 2, 3)
    assert torch.equal(compiled(x)[0], inner(x)[0])


def test_a_model_without_any_is_refused():
    """Who asks for an exchange should not believe that it took place."""
    model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3))
    for module, name in ((model, "Sequential"), (model[1], "GRU")):
        for copies in (False, True):
            with pytest.raises(ValueError, match=rf"expected an nn\.LSTM.* got: {name}, which"):
                fastlstm.from_torch(module, copy=copies)
    assert fastlstm.to_torch(model) is model


def test_a_model_that_is_exchanged_already_is_returned_as_it_is():
    already = fastlstm.LSTM(3, 5)
    for model in (already, nn.Sequential(already), nn.Sequential(fastlstm.LSTMCell(3, 5))):
        before = list(model.modules())
        assert fastlstm.from_torch(model) is model
        assert list(model.modules()) == before


def test_what_is_no_module_is_refused():
    for convert in (fastlstm.from_torch, fastlstm.to_torch):
        with pytest.raises(TypeError, match=r"module should be an nn\.Module, got: str"):
            convert("lstm")
