"""Batches of gradients: ``is_grads_batched``, vectorized Jacobians and Hessians, as of nn.LSTM."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm import functional

FORMS = {
    "plain": {},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 2},
    "no bias": {"bias": False},
    "batch_first": {"batch_first": True},
}


def results(module, x, hx=None):
    output, state = module(x, hx)
    return (output.data if isinstance(output, PackedSequence) else output), *state


def assert_equal_pairs(run, pairs, *arguments):
    """What ``run`` makes of each of the two modules is the same."""
    found, expected = (run(module, *arguments) for module in pairs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_gradients_is_nn_lstms(form, twins):
    theirs, ours = twins(2, 3, **FORMS[form], dtype=torch.float64)
    x = leaf(4, 2, 2)

    def run(module):
        outputs = results(module, x)
        generator = torch.Generator().manual_seed(1)
        arriving = [torch.randn(5, *y.shape, generator=generator).to(y) for y in outputs]
        leaves = [x, *module.parameters()]
        batched = torch.autograd.grad(outputs, leaves, arriving, True, is_grads_batched=True)
        for v in range(5):
            one = torch.autograd.grad(outputs, leaves, [g[v] for g in arriving], True)
            torch.testing.assert_close([g[v] for g in batched], list(one))
        return batched

    assert_equal_pairs(run, (theirs, ours))


@pytest.mark.parametrize("create_graph", [False, True])
def test_only_some_gradients_arrive_and_are_wanted(create_graph, twins):
    theirs, ours = twins(2, 3, 2, dtype=torch.float64)
    x, hx = leaf(4, 2, 2), (leaf(2, 2, 3), leaf(2, 2, 3))

    def run(module):
        c_n = results(module, x, hx)[2]
        arriving = torch.ones(3, *c_n.shape, dtype=torch.float64).cumsum(0)
        leaves = [hx[1], module.weight_hh_l1]
        return torch.autograd.grad(
            c_n, leaves, arriving, create_graph=create_graph, is_grads_batched=True
        )

    assert_equal_pairs(run, (theirs, ours))


@pytest.mark.parametrize("form", FORMS)
def test_vectorized_jacobian_is_nn_lstms(form, twins):
    theirs, ours = twins(2, 3, **FORMS[form], dtype=torch.float64)
    names = [name for name, _ in ours.named_parameters()]

    def run(module, x):
        def of(x, *weights):
            return functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

        operands = (x, *(p.detach() for p in module.parameters()))
        return jacobian(of, operands, vectorize=True)

    assert_equal_pairs(run, (theirs, ours), leaf(3, 2, 2).detach())


@pytest.mark.parametrize("form", FORMS)
def test_vectorized_hessian_is_nn_lstms(form, twins):
    theirs, ours = twins(2, 3, **FORMS[form], dtype=torch.float64)

    def run(module, x):
        def loss(x, weight):
            found = functional_call(module, {"weight_hh_l0": weight}, (x,))
            return found[0].square().sum() + found[1][1].sum()

        return hessian(loss, (x, module.weight_hh_l0.detach()), vectorize=True)

    assert_equal_pairs(run, (theirs, ours), leaf(3, 1, 2).detach())


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(enforce_sorted, twins):
    theirs, ours = twins(2, 3, bidirectional=True, dtype=torch.float64)
    lengths = torch.tensor([4, 2, 1] if enforce_sorted else [1, 4, 2])

    def run(module, x):
        def of(x):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
            return results(module, packed)

        return jacobian(of, x, vectorize=True)

    assert_equal_pairs(run, (theirs, ours), leaf(4, 3, 2).detach())


def test_cells():
    theirs, ours = (cls(2, 3).double() for cls in (nn.LSTMCell, fastlstm.LSTMCell))
    ours.load_state_dict(theirs.state_dict())
    operands = tuple(leaf(2, n).detach() for n in (2, 3, 3))

    def values(cell, x, h, c):
        return cell(x, (h, c))[0].square().sum()

    assert_equal_pairs(
        lambda cell: jacobian(lambda x, h, c: cell(x, (h, c)), operands, vectorize=True),
        (theirs, ours),
    )
    assert_equal_pairs(
        lambda cell: hessian(lambda *args: values(cell, *args), operands, vectorize=True),
        (theirs, ours),
    )


def by_weights(module, x, seed=None, **given):
    """A stack as a function of its weights, and those weights."""

    def run(*weights):
        found = functional.lstm(
            x, None, weights, num_layers=module.num_layers, bidirectional=module.bidirectional,
            dropout=module.dropout, training=True, seed=seed, **given,
        )  # fmt: skip
        return found[0], *found[1], *found[2:]

    return run, [p.detach().requires_grad_() for p in module.parameters()]


OF_OUR_OWN = {
    "indices": lambda: (fastlstm.LSTM(4, 2, 2), torch.randint(4, (3, 2)), {}),
    "packed indices": lambda: (
        fastlstm.LSTM(4, 2),
        torch.randint(4, (5,)),
        {"batch_sizes": torch.tensor([2, 2, 1])},
    ),
    "dropout from a seed": lambda: (
        fastlstm.LSTM(2, 2, 2, dropout=0.5),
        torch.randn(3, 2, 2).double(),
        {"seed": torch.tensor([7])},
    ),
    "the cell states": lambda: (
        fastlstm.LSTM(2, 2, bidirectional=True),
        torch.randn(3, 2, 2).double(),
        {"return_cells": True},
    ),
    "lengths": lambda: (
        fastlstm.LSTM(2, 2, bidirectional=True),
        torch.randn(3, 2, 2).double(),
        {"lengths": [2, 3]},
    ),
    "zoneout and clipping": lambda: (
        fastlstm.LSTM(2, 2),
        torch.randn(3, 2, 2).double(),
        {"seed": torch.tensor([7]), "zoneout_h": 0.5, "zoneout_c": 0.5, "cell_clip": 1.0},
    ),
}


@pytest.mark.parametrize("form", OF_OUR_OWN)
def test_gradcheck_of_batched_gradients(form):
    """Against numeric derivatives, the first and the second."""
    module, x, given = OF_OUR_OWN[form]()
    run, weights = by_weights(module.double(), x, **given)
    checked = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(run, weights, **checked)
    assert torch.autograd.gradgradcheck(run, weights, **checked)


def test_gradcheck_of_a_layer_normalised_stack():
    lstm = fastlstm.LSTM(2, 3, layer_norm=True).double()
    leaves = (leaf(3, 2, 2), *lstm.parameters())
    names = [name for name, _ in lstm.named_parameters()]

    def run(x, *weights):
        return functional_call(lstm, dict(zip(names, weights, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, leaves, check_batched_grad=True, fast_mode=True)
    expected = jacobian(lambda x: lstm(x)[0], leaves[0].detach())
    found = jacobian(lambda x: lstm(x)[0], leaves[0].detach(), vectorize=True)
    torch.testing.assert_close(found, expected)


def test_gradcheck_of_a_cell():
    cell = fastlstm.LSTMCell(2, 3).double()
    leaves = (leaf(2, 2), leaf(2, 3), leaf(2, 3))
    checked = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda x, *hx: cell(x, hx), leaves, **checked)
    assert torch.autograd.gradgradcheck(lambda x, *hx: cell(x, hx), leaves, **checked)


def test_dropout_in_training_follows_its_one_draw():
    """The forward pass draws; no gradient of a batch draws again."""
    lstm = fastlstm.LSTM(2, 20, 2, dropout=0.5).double()
    x = leaf(3, 2, 2)
    output = lstm(x)[0]
    arriving = torch.randn(4, *output.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(output, x, arriving, True, is_grads_batched=True)
    for v in range(4):
        torch.testing.assert_close(batched[v], torch.autograd.grad(output, x, arriving[v], True)[0])


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_both_strategies_of_torch(strategy):
    """Forward mode is one that nn.LSTM lacks."""
    lstm, x = fastlstm.LSTM(2, 3).double(), leaf(3, 2, 2).detach()

    def run(x):
        return lstm(x)[0]

    found = jacobian(run, x, vectorize=True, strategy=strategy)
    torch.testing.assert_close(found, jacobian(run, x))
    found = hessian(
        lambda x: run(x).pow(3).sum(), x, vectorize=True, outer_jacobian_strategy=strategy
    )
    torch.testing.assert_close(found, hessian(lambda x: run(x).pow(3).sum(), x))
