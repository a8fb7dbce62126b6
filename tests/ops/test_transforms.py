"""vmap, per-sample gradients, forward mode and higher derivatives: torch.func on fastlstm.LSTM.

``nn.LSTM`` gives none of them. Here the judge is the float64 reference, which torch
differentiates by itself.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import fastlstm
from benchmarks.problems import OPTIONS, Problem, make
from fastlstm import ops, reference

NAMES = ["plain", "no bias", "zero states", "both directions", "three layers", "projection"]


def stacks(name, **changes):
    """The native stack and the reference as functions of the same operands."""
    x = make(Problem(dtype=torch.float64, **{**OPTIONS[name], **changes}))
    places = {"h0": x.h0, "c0": x.c0}
    states = [key for key, value in places.items() if value is not None]
    operands = tuple(t.detach() for t in (x.input, *(places[key] for key in states), *x.weights))

    def function(lstm):
        def run(input, *rest):
            state = dict(zip(states, rest, strict=False))
            weights = rest[len(states) :]
            return lstm(input, (state.get("h0"), state.get("c0")), weights, x.stack, x.call)

        return run

    return function(ops.lstm), function(reference.lstm), operands


def assert_equal(found, expected, tolerance=1e-10):
    flat = torch.utils._pytree.tree_leaves
    assert len(flat(found)) == len(flat(expected))
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_jvp(name):
    ours, theirs, operands = stacks(name)
    tangents = tuple(torch.randn_like(x) for x in operands)
    assert_equal(jvp(ours, operands, tangents), jvp(theirs, operands, tangents))


@pytest.mark.parametrize("name", ["packed", "dropout", "everything"])
def test_jvp_of_packed_index_and_dropped_input(name):
    x = make(Problem(dtype=torch.float64, **OPTIONS[name]))
    weights = tuple(w.detach() for w in x.weights)
    tangents = tuple(torch.randn_like(w) for w in weights)

    def run(lstm):
        return lambda *weights: lstm(x.input.detach(), x.state, weights, x.stack, x.call)

    assert_equal(jvp(run(ops.lstm), weights, tangents), jvp(run(reference.lstm), weights, tangents))


def test_dual_numbers():
    ours, theirs, operands = stacks("three layers")
    tangents = [torch.randn_like(x) for x in operands]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(operands, tangents, strict=True)]
        found = [forward_ad.unpack_dual(y).tangent for y in ours(*duals)]
    assert_equal(found, list(jvp(theirs, operands, tuple(tangents))[1]))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_forward_mode(name):
    ours, _, operands = stacks(name)
    leaves = tuple(x.clone().requires_grad_() for x in operands)
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobian(transform):
    ours, theirs, operands = stacks("both directions")

    def of(stack):
        return lambda x: stack(x, *operands[1:])[0]

    assert_equal(transform(of(ours))(operands[0]), jacrev(of(theirs))(operands[0]))


@pytest.mark.parametrize(
    "transform",
    [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacfwd(f)),
    ],
    ids=["forward over reverse", "reverse twice", "reverse over forward", "forward twice"],
)
def test_hessian(transform):
    ours, theirs, operands = stacks("projection", hidden_size=4, batch=2, steps=3)

    def loss(stack):
        return lambda x: sum(y.square().sum() for y in stack(x, *operands[1:]))

    assert_equal(transform(loss(ours))(operands[0]), hessian(loss(theirs))(operands[0]))


def test_third_derivative():
    ours, theirs, operands = stacks("plain", hidden_size=2, input_size=2, batch=1, steps=2)

    def third(stack):
        def loss(x):
            return stack(x, *operands[1:])[0].pow(3).sum()

        return jacrev(jacrev(jacrev(loss)))(operands[0])

    assert_equal(third(ours), third(theirs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batched", ["input", "states too", "weights too"])
def test_vmap(batched, name):
    ours, theirs, operands = stacks(name)
    n_states = {"zero states": 0}.get(name, 2)
    count = {"input": 1, "states too": 1 + n_states, "weights too": len(operands)}[batched]
    dims = tuple(0 if j < count else None for j in range(len(operands)))
    many = tuple(
        torch.randn(5, *x.shape, dtype=x.dtype) if j < count else x for j, x in enumerate(operands)
    )
    found = vmap(ours, in_dims=dims)(*many)
    one_by_one = [
        theirs(*(x[v] if d == 0 else x for x, d in zip(many, dims, strict=True))) for v in range(5)
    ]
    expected = tuple(torch.stack(same) for same in zip(*one_by_one, strict=True))
    assert_equal(found, expected)


def test_vmap_over_any_dimension_and_nested():
    lstm = fastlstm.LSTM(3, 4).double()
    x = torch.randn(2, 6, 5, 7, 3, dtype=torch.float64)  # T is the second, B the fourth

    def run(x):
        return lstm(x)[0]

    found = vmap(vmap(run, in_dims=1, out_dims=1), in_dims=0)(x)
    expected = torch.stack(
        [torch.stack([run(x[j, :, k]) for k in range(5)], dim=1) for j in range(2)]
    )
    assert_equal(found, expected)


def test_vmap_of_indices():
    lstm = fastlstm.LSTM(9, 4)
    x = torch.randint(9, (3, 6, 2))
    assert_equal(vmap(lambda x: lstm(x)[0])(x), torch.stack([lstm(x[j])[0] for j in range(3)]))


def test_per_sample_gradients():
    lstm = fastlstm.LSTM(3, 4, 2, bidirectional=True).double()
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(6, 5, 1, 3, dtype=torch.float64)  # six samples of batch 1

    def loss(parameters, x):
        output, (_, c_n) = functional_call(lstm, parameters, (x,))
        return output.square().sum() + c_n.sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for v in range(6):
        lstm.zero_grad()
        loss(dict(lstm.named_parameters()), x[v]).backward()
        for name, p in lstm.named_parameters():
            torch.testing.assert_close(found[name][v], p.grad)


def test_gradient_through_vmap():
    """Of shared weights, summed over all samples."""
    lstm = fastlstm.LSTM(3, 4, 2)
    x = torch.randn(6, 5, 2, 3)
    vmap(lambda x: lstm(x)[0])(x).square().sum().backward()
    found = [p.grad.clone() for p in lstm.parameters()]
    lstm.zero_grad()
    lstm(x.transpose(0, 1).flatten(1, 2))[0].square().sum().backward()
    for a, p in zip(found, lstm.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)


def test_an_ensemble():
    models = [fastlstm.LSTM(3, 4) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(5, 2, 3)

    def run(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (x,))[0]

    found = vmap(run)(parameters, buffers)
    assert_equal(found, torch.stack([m(x)[0] for m in models]), 1e-6)


def test_dropout_under_vmap_follows_its_randomness():
    lstm = fastlstm.LSTM(3, 40, 2, dropout=0.5)
    x = torch.randn(5, 2, 3).expand(4, -1, -1, -1)
    same = vmap(lambda x: lstm(x)[0], randomness="same")(x)
    assert torch.equal(same[0], same[3])
    different = vmap(lambda x: lstm(x)[0], randomness="different")(x)
    assert not torch.equal(different[0], different[3])
    with pytest.raises(RuntimeError, match="random"):
        vmap(lambda x: lstm(x)[0])(x)


def test_cell_under_vmap():
    cell = fastlstm.LSTMCell(3, 4)
    x = torch.randn(5, 2, 3)
    assert_equal(vmap(lambda x: cell(x)[1])(x), torch.stack([cell(row)[1] for row in x]), 1e-6)


def test_vjp_of_everything():
    ours, theirs, operands = stacks("three layers")
    y, pull = vjp(ours, *operands)
    gradients = tuple(torch.randn_like(v) for v in y)
    assert_equal(pull(gradients), vjp(theirs, *operands)[1](gradients))


def test_gradient_penalty():
    """As WGAN-GP has it: the norm of the input's gradient, trained through."""
    torch.manual_seed(0)
    lstm, head = fastlstm.LSTM(3, 8), torch.nn.Linear(8, 1)
    theirs = torch.nn.LSTM(3, 8)
    theirs.load_state_dict(lstm.state_dict())

    def gradients(module):
        x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        score = head(module(x)[0][-1]).sum()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(penalty, list(module.parameters()))

    for a, b in zip(gradients(lstm), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
