"""The native operators agree with the float64 reference, in every option, and with autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import problems
from benchmarks.problems import Problem, assert_matches_reference, make, outputs_and_gradients
from fastlstm import ops, reference
from fastlstm.ops.native import scalars_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD = [1, 3, 7, 16, 33, 129]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


OPTIONS = {
    "plain": {},
    "no bias": {"has_bias": False},
    "projection": {"proj_size": 3},
    "projection larger than a panel": {"hidden_size": 65, "proj_size": 34, "num_layers": 2},
    "both directions": {"bidirectional": True},
    "three layers": {"num_layers": 3},
    "zero states": {"states": False},
    "packed": {"packed": True, "batch": 13, "steps": 9},
    "packed both directions": {"packed": True, "bidirectional": True, "num_layers": 2, "batch": 13},
    "dropout": {"num_layers": 3, "dropout": 0.4, "hidden_size": 33},
    "dropout of everything": {"num_layers": 2, "dropout": 1.0},
    "index int64": {"index": torch.int64, "num_layers": 2},
    "index int32": {"index": torch.int32, "packed": True, "batch": 9},
    "index without bias": {"index": torch.int64, "has_bias": False},
    "large vocabulary": {"index": torch.int64, "input_size": 5000, "hidden_size": 3},
    "more rows than are projected at once": {"batch": 67, "steps": 5, "hidden_size": 17},
    "a step larger than that": {"batch": 200, "steps": 2, "hidden_size": 3},
    "wide input": {"input_size": 700, "hidden_size": 9},
    "deep sum": {"hidden_size": 150, "steps": 2},
    "everything": {
        "num_layers": 2, "proj_size": 9, "hidden_size": 33, "bidirectional": True, "packed": True,
        "dropout": 0.3, "batch": 11, "steps": 6, "index": torch.int64, "input_size": 19,
    },
    **{name: fields for name, fields in problems.OPTIONS.items()
       if Problem(**fields).stack.has_rules},
    **problems.NORMED,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_reference(name, dtype, instruction_set):
    assert_matches_reference(Problem(dtype=dtype, **OPTIONS[name]))


@pytest.mark.parametrize("hidden", ODD)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 13, 33])
def test_matches_reference_at_odd_sizes(hidden, batch, instruction_set):
    assert_matches_reference(
        Problem(input_size=hidden + 1, hidden_size=hidden, batch=batch, num_layers=2)
    )


# Few rows read the weights as they stand, or pack a block of units for one step.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [7, 66, 129])
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 1, "steps": 1},
        {"batch": 3, "steps": 1, "num_layers": 2, "states": False},
        {"batch": 2, "steps": 3, "bidirectional": True, "num_layers": 2, "dropout": 0.3},
        {"batch": 4, "steps": 2, "has_bias": False, "index": torch.int64, "num_layers": 2},
        {"batch": 7, "steps": 1},
        {"batch": 33, "steps": 1, "input_size": 700, "num_layers": 2, "bidirectional": True},
        {"batch": 16, "steps": 1, "index": torch.int64, "packed": True, "states": False},
        {"batch": 5, "steps": 1, "zoneout_h": 0.3, "recurrent_dropout": 0.2},
        {"batch": 3, "steps": 2, "packed": True, "index": torch.int32},
    ],
    ids=str,
)
def test_matches_reference_of_few_rows(options, hidden, dtype, instruction_set):
    assert_matches_reference(Problem(hidden_size=hidden, dtype=dtype, **options))


@pytest.mark.parametrize("batch", [1, 8, 33])
def test_few_rows_do_not_depend_on_threads(batch, threads):
    x = make(Problem(input_size=300, hidden_size=300, batch=batch, steps=1, num_layers=2))
    outputs, _ = outputs_and_gradients(ops.lstm, x)
    torch.set_num_threads(1)
    same, _ = outputs_and_gradients(ops.lstm, x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Problem,
        input_size=st.integers(1, 70),
        hidden_size=st.integers(9, 70),
        num_layers=st.integers(1, 3),
        batch=st.integers(1, 40),
        steps=st.integers(1, 9),
        has_bias=st.booleans(),
        proj_size=st.integers(0, 8),
        bidirectional=st.booleans(),
        dropout=st.sampled_from([0.0, 0.5]),
        index=st.sampled_from([None, torch.int64, torch.int32]),
        packed=st.booleans(),
        states=st.booleans(),
        random_seed=st.integers(0, 1000),
    )
)
def test_matches_reference_on_drawn_problems(problem):
    assert_matches_reference(problem)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_result_depends_on_what_memory_held_before(name):
    """Scratch that a call full of NaN has left: nothing of it shows in the next one."""
    x, nan = make(Problem(**OPTIONS[name])), make(Problem(**OPTIONS[name]))
    with torch.no_grad():
        for weight in nan.weights:
            weight.fill_(torch.nan)
    for _ in range(8):
        outputs_and_gradients(ops.lstm, nan)
        outputs, gradients = outputs_and_gradients(ops.lstm, x)
        assert not any(y.isnan().any() for y in [*outputs, *gradients])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj_size", [0, 3])
def test_an_infinite_input_saturates_gates_and_no_more(proj_size, dtype, instruction_set):
    """It spoils no later step of its sequence, whatever is computed in the padding of rows."""
    x = make(Problem(hidden_size=33, proj_size=proj_size, num_layers=2, steps=5, dtype=dtype))
    with torch.no_grad():
        x.input[0, 0, 0], x.input[1, 1, 2] = torch.inf, -torch.inf
    actual, _ = outputs_and_gradients(ops.lstm, x)
    expected, _ = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    for a, b in zip(actual, expected, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.02)


def test_result_does_not_depend_on_threads(threads):
    """Bit for bit: no sum's order follows from who computes it."""
    problem = Problem(
        num_layers=2, batch=50, steps=7, hidden_size=40, bidirectional=True, packed=True,
        dropout=0.5,
    )  # fmt: skip
    x = make(problem)
    outputs, gradients = outputs_and_gradients(ops.lstm, x)
    torch.set_num_threads(2)
    same_outputs, same_gradients = outputs_and_gradients(ops.lstm, x)
    for a, b in zip(outputs + gradients, same_outputs + same_gradients, strict=True):
        assert torch.equal(a, b)


def test_inference_equals_training_forward():
    x = make(Problem(num_layers=2, batch=9, bidirectional=True))
    kept = ops.lstm(*x.arguments)
    with torch.no_grad():
        free = ops.lstm(*x.arguments)
    assert kept[0].requires_grad
    assert not free[0].requires_grad
    for a, b in zip(kept, free, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("index", [None, torch.int64])
def test_strides_of_the_input_do_not_matter(index):
    x = make(Problem(index=index, batch=6, steps=5))
    expected = ops.lstm(*x.arguments)[0]
    for view in (
        x.input.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack((x.input, x.input), -1)[..., 0],
        x.input.repeat(2, 2, *(1,) * (x.input.dim() - 2))[:5, 6:],
    ):
        assert torch.equal(expected, ops.lstm(view, *x.arguments[1:])[0])


@pytest.mark.parametrize("wanted", ["input", "h0", "c0", "weights"])
def test_only_needed_gradients_are_made(wanted):
    x = make(Problem(num_layers=2))
    everything = dict(zip(map(id, x.leaves()), outputs_and_gradients(ops.lstm, x)[1], strict=True))
    keep = getattr(x, wanted)
    keep = keep if isinstance(keep, list) else [keep]
    for leaf in x.leaves():
        leaf.requires_grad_(any(leaf is k for k in keep))
    _, gradients = outputs_and_gradients(ops.lstm, x)
    assert len(gradients) == len(keep)
    for leaf, gradient in zip(keep, gradients, strict=True):
        assert torch.equal(gradient, everything[id(leaf)])


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_from_one_output_alone(used):
    x = make(Problem(num_layers=2, bidirectional=True, dtype=torch.float64))
    from fastlstm import reference

    ours = ops.lstm(*x.arguments)[used].square().sum()
    theirs = reference.lstm(*x.arguments)[used].square().sum()
    for a, b in zip(
        torch.autograd.grad(ours, x.leaves(), allow_unused=True, materialize_grads=True),
        torch.autograd.grad(theirs, x.leaves(), allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


SMALL = {
    "plain": Problem(2, 3, 1, 2, 3, dtype=torch.float64),
    "two layers both directions": Problem(
        2, 3, 2, 2, 3, bidirectional=True, dropout=0.5, dtype=torch.float64
    ),
    "projection": Problem(2, 3, 2, 2, 2, proj_size=2, dtype=torch.float64),
    "packed": Problem(2, 3, 1, 3, 3, packed=True, dtype=torch.float64),
    "index": Problem(4, 2, 2, 2, 2, index=torch.int64, dtype=torch.float64),
}


def as_function(x):
    """The operator as a function of its differentiable tensors alone."""
    fixed = [x.input, x.h0, x.c0, *x.weights]

    def call(*leaves):
        left = iter(leaves)
        given = [next(left) if t is not None and t.requires_grad else t for t in fixed]
        return ops.lstm(given[0], given[1:3], given[3:], x.stack, x.call)

    return call


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name):
    x = make(SMALL[name])
    assert torch.autograd.gradcheck(as_function(x), x.leaves())


@pytest.mark.parametrize("name", SMALL)
def test_gradgradcheck(name):
    x = make(SMALL[name])
    assert torch.autograd.gradgradcheck(as_function(x), x.leaves())


@pytest.mark.parametrize(
    ("name", "grad"),
    [*((name, False) for name in SMALL), ("two layers both directions", True), ("index", True)],
)
def test_opcheck(name, grad):
    x = make(SMALL[name])
    if not grad:
        x = make(SMALL[name]).to(torch.float64)
        for leaf in x.leaves():
            leaf.requires_grad_(False)
    scalars = scalars_of(x.stack, x.call.dropout)
    arguments = (
        x.input, x.h0, x.c0, x.weights, x.call.batch_sizes, x.call.seed, *scalars, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastlstm.forward.default, arguments)
    with torch.no_grad():
        y, h_n, c_n, *saved = torch.ops.fastlstm.forward(*arguments)
    needs = [True] * (3 + len(x.weights))
    torch.library.opcheck(
        torch.ops.fastlstm.backward.default,
        (torch.ones_like(y), h_n, c_n, None, *arguments[:6], y, *saved, *scalars, needs),
    )


@pytest.mark.parametrize("name", ["plain", "two layers both directions", "index"])
def test_compiles_whole(name):
    x = make(SMALL[name])
    call = as_function(x)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*x.leaves()), call(*x.leaves()), strict=True):
        assert torch.equal(a, b)
    gradients = [
        torch.autograd.grad(f(*x.leaves())[0].square().sum(), x.leaves(), allow_unused=True)
        for f in (compiled, call)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b)


def test_direct_call_refuses_what_it_cannot_read():
    x = make(Problem())
    options = scalars_of(x.stack, 0.0)
    weights = [w.detach() for w in x.weights]
    with pytest.raises(RuntimeError, match="expected 4 weights, got 3"):
        torch.ops.fastlstm.forward(
            x.input.detach(), None, None, weights[:3], None, None, *options, False
        )
    bad = torch.tensor([[0, 4], [5, 1]])
    with pytest.raises(RuntimeError, match="index 5 at row 2 is outside"):
        torch.ops.fastlstm.forward(bad, None, None, weights, None, None, *options, False)
    for sizes in ([2, 1], [2, 3], [5, 0]):
        with pytest.raises(RuntimeError, match="batch_sizes"):
            torch.ops.fastlstm.forward(
                torch.randn(5, 5), None, None, weights, torch.tensor(sizes), None, *options, False
            )
    for sizes in (torch.tensor([3, 2], dtype=torch.int32), torch.tensor([[5]]), torch.ones(5)):
        with pytest.raises(RuntimeError, match=r"batch_sizes must be int64 \(T\) on the CPU"):
            torch.ops.fastlstm.forward(
                torch.randn(5, 5), None, None, weights, sizes, None, *options, False
            )
    for seed in (torch.ones(1), torch.ones(1, dtype=torch.int32), torch.tensor([1, 2])):
        with pytest.raises(RuntimeError, match="seed must be one int64 element"):
            torch.ops.fastlstm.forward(
                x.input.detach(), None, None, weights, None, seed, *options, False
            )
    with pytest.raises(RuntimeError, match="a sequence has at least one step"):
        torch.ops.fastlstm.forward(
            torch.randn(0, 3, 5), None, None, weights, None, None, *options, False
        )
    short = [weights[0], weights[1][:-1], *weights[2:]]
    expected = r"weight_hh must have the weights' dtype and shape \(28, 7\), got \(27, 7\)"
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.fastlstm.forward(x.input.detach(), None, None, short, None, None, *options, False)
    with pytest.raises(RuntimeError, match="c0 must have the weights' dtype"):
        torch.ops.fastlstm.forward(
            x.input.detach(), None, torch.zeros(1, 3, 7).double(), weights, None, None, *options,
            False,
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda w_ih: torch.ops.fastlstm.forward(
                x.input.detach(), None, None, [w_ih, *weights[1:]], None, None, *options, True
            )[0],
            (weights[0],),
            (weights[0],),
        )
