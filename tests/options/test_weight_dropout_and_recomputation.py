"""Options that nn.LSTM lacks: weight dropout, and recomputation in backward."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm


def run(module, x, hx=None):
    """Outputs and gradients of everything, dropout from one seed."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(3)
    output, (h_n, c_n) = module(x, hx)
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    leaves = [x] * x.requires_grad + list(module.parameters())
    return [output, h_n, c_n, *torch.autograd.grad(loss, leaves)]


def held(module, x):
    """Bytes that autograd keeps, the parameters and the input left out."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(x)
    for tensor in (x, *module.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())


@pytest.mark.parametrize("every", [1, 4, 7, 100])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"num_layers": 3, "proj_size": 3}], ids=str
)
def test_recomputation_changes_no_number(options, every):
    plain = fastlstm.LSTM(5, 6, **options).double()
    lean = fastlstm.LSTM(5, 6, **options, checkpoint_every=every).double()
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(11, 11, 5, dtype=torch.float64)
    for a, b in zip(run(lean, x), run(plain, x), strict=True):
        torch.testing.assert_close(a, b)
    hx = tuple(s.detach() for s in lean(x)[1])
    for a, b in zip(run(lean, x, hx), run(plain, x, hx), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("x", [torch.randint(5, (11, 2)), torch.randn(11, 5)], ids=["index", "2-D"])
def test_recomputation_of_other_forms_of_input(x):
    plain, lean = fastlstm.LSTM(5, 6), fastlstm.LSTM(5, 6, checkpoint_every=4)
    lean.load_state_dict(plain.state_dict())
    for a, b in zip(run(lean, x), run(plain, x), strict=True):
        torch.testing.assert_close(a, b)


def test_recomputation_drops_the_same_elements_again():
    """The gradient is that of the forward pass that was seen."""
    lean = fastlstm.LSTM(3, 4, 2, dropout=0.5, checkpoint_every=2).double()
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def loss(x):
        torch.manual_seed(1)
        return lean(x)[0].square().sum()

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))


def _gradient(module, x):
    weights = dict(module.named_parameters())
    return grad(lambda w: functional_call(module, w, (x,))[0].square().sum())(weights)


def _dual(module, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))[0]).tangent


@pytest.mark.parametrize(
    "derivative",
    [_gradient, _dual, lambda module, x: jvp(lambda x: module(x)[0], (x,), (x,))],
    ids=["grad", "dual numbers", "jvp"],
)
def test_derivatives_that_forbid_recomputation_do_without(derivative):
    plain, lean = fastlstm.LSTM(5, 6), fastlstm.LSTM(5, 6, checkpoint_every=4)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(7, 2, 5)
    torch.testing.assert_close(derivative(lean, x), derivative(plain, x))


def test_recomputation_holds_less():
    plain, lean = fastlstm.LSTM(16, 64, 2), fastlstm.LSTM(16, 64, 2, checkpoint_every=10)
    x = torch.randn(100, 8, 16)
    assert held(lean, x) < held(plain, x) / 8


def test_nothing_is_recomputed_without_gradients():
    lean = fastlstm.LSTM(3, 4, checkpoint_every=2)
    with torch.no_grad():
        output, _ = lean(torch.randn(5, 2, 3))
    assert output.shape == (5, 2, 4)


def test_weight_dropout_drops_weight_hh_alone_and_in_training_alone():
    lstm = fastlstm.LSTM(3, 50, 2, weight_dropout=0.4)
    x = torch.randn(6, 2, 3)
    torch.manual_seed(5)
    dropped = lstm(x)[0]
    torch.manual_seed(5)
    plain = fastlstm.LSTM(3, 50, 2)
    plain.load_state_dict(lstm.state_dict())
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in range(2):
            weight = getattr(plain, f"weight_hh_l{layer}")
            weight.copy_(torch.nn.functional.dropout(weight, 0.4))
    torch.testing.assert_close(dropped, plain(x)[0])
    rate = (plain.weight_hh_l0 == 0).double().mean()
    assert abs(rate - 0.4) < 0.02
    plain.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm.eval()(x)[0], plain(x)[0])


def test_gradient_of_a_dropped_weight_is_zero():
    lstm = fastlstm.LSTM(3, 10, weight_dropout=0.5)
    lstm(torch.randn(6, 2, 3))[0].sum().backward()
    zero = (lstm.weight_hh_l0.grad == 0).double().mean()
    assert 0.3 < zero < 0.7


def test_weight_dropout_and_recomputation_together():
    lstm = fastlstm.LSTM(3, 4, weight_dropout=0.5, checkpoint_every=2).double()
    plain = fastlstm.LSTM(3, 4, weight_dropout=0.5).double()
    plain.load_state_dict(lstm.state_dict())
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    for a, b in zip(run(lstm, x), run(plain, x), strict=True):
        torch.testing.assert_close(a, b)


def test_options_are_kept_and_shown():
    lstm = fastlstm.LSTM(3, 4, weight_dropout=0.25, checkpoint_every=8)
    for twin in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert (twin.weight_dropout, twin.checkpoint_every) == (0.25, 8)
    assert repr(lstm) == "fastlstm.LSTM(3, 4, weight_dropout=0.25, checkpoint_every=8)"
    assert repr(fastlstm.LSTM(3, 4)) == "fastlstm.LSTM(3, 4)"
    with pytest.raises(ValueError, match=r"^module: nn.LSTM has no weight_dropout"):
        fastlstm.to_torch(lstm)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight_dropout": 1.5}, r"weight_dropout should be a number in range \[0, 1\], got 1.5"),
        ({"checkpoint_every": 0}, "checkpoint_every should be a number of steps or None, got 0"),
        ({"checkpoint_every": 2.0}, "checkpoint_every should be a number of steps or None"),
        ({"checkpoint_every": 2, "bidirectional": True}, "expected bidirectional=False"),
    ],
    ids=str,
)
def test_wrong_options(options, says):
    with pytest.raises(ValueError, match=says):
        fastlstm.LSTM(3, 4, **options)


def test_recomputation_needs_padded_input():
    lstm, x = fastlstm.LSTM(3, 4, checkpoint_every=2), torch.randn(5, 2, 3)
    for call in (lambda: lstm(pack_padded_sequence(x, [5, 2])), lambda: lstm(x, lengths=[5, 2])):
        with pytest.raises(ValueError, match="expected padded input without lengths"):
            call()


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        fastlstm.LSTM(3, 4, 1, True, False, 0.0, False, 0, None, None, 0.5)
