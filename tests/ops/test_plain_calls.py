"""The short way of a plain call: the same results and errors, and only where nobody has to see it.

``fastlstm.ops.plain`` gives None for every call that has to take the usual way.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm
from fastlstm import _C, functional
from fastlstm.ops import plain
from fastlstm.stack import Call

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "three layers": {"num_layers": 3, "dropout": 0.5},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 3, "num_layers": 2},
    "batch first": {"batch_first": True, "bidirectional": True},
}


def operands(lstm, form, index, states, steps=4, batch=3):
    """Random ones: "batched" or "unbatched", of features or indices, with states or without."""
    sizes = () if form == "unbatched" else (batch,)
    leading = (*sizes, steps) if lstm.batch_first else (steps, *sizes)
    dtype, stack = lstm.weight_ih_l0.dtype, lstm.stack
    x = torch.randint(5, leading) if index else torch.randn(*leading, 5).to(dtype)
    if not states:
        return x, None
    h0, c0 = (
        torch.randn(stack.pseudo_layers, *sizes, n).to(dtype)
        for n in (stack.out_size, stack.hidden_size)
    )
    return x, (h0, c0)


def flat(results):
    output, (h_n, c_n) = results
    return output, h_n, c_n


def usual(lstm, x, hx=None):
    """The usual way: what the short one has to give."""
    weights, call = lstm._current_weights(), Call(lstm.dropout)
    return functional.run(x, hx, weights, lstm.stack, call, lstm.training, lstm.batch_first)


@pytest.fixture
def calls(monkeypatch):
    """What the short way's native calls were given, call by call, with a gradient or without."""
    seen = []

    def watch(name):
        native = getattr(plain, name)

        def spy(*arguments):
            seen.append(arguments)
            return native(*arguments)

        monkeypatch.setattr(plain, name, spy)

    watch("_infer")
    watch("_apply")
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_inference_gives_what_a_call_with_gradients_gives(name, dtype, mode):
    lstm = fastlstm.LSTM(5, 7, **OPTIONS[name], dtype=dtype).eval()
    for form in ("batched", "unbatched"):
        for index in (False, True):
            for states in (False, True):
                x, hx = operands(lstm, form, index, states)
                expected = flat(usual(lstm, x, hx))
                with mode():
                    assert plain.run_plain(lstm, x, hx) is not None
                    found = flat(lstm(x, hx))
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a, b)
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                    assert not a.requires_grad


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_training_gives_what_the_usual_way_gives(name, dtype, calls):
    lstm = fastlstm.LSTM(5, 7, **OPTIONS[name] | {"dropout": 0.0}, dtype=dtype)
    for index in (False, True):
        for states in (False, True):
            x, hx = operands(lstm, "batched", index, states)
            leaves = [y.requires_grad_() for y in (x, *(hx or ())) if y.is_floating_point()]
            leaves += lstm.parameters()
            before = len(calls)
            results = []
            for way in (lstm, lambda x, hx: usual(lstm, x, hx)):
                out = flat(way(x, hx))
                total = sum((y.double() * (j + 1)).sum() for j, y in enumerate(out))
                results.append((*out, *torch.autograd.grad(total, leaves)))
            assert len(calls) == before + 1
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                assert a.requires_grad == b.requires_grad


def test_a_second_derivative_of_a_plain_call():
    lstm = fastlstm.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: lstm(x)[0], x)


def test_a_frozen_module_needs_no_mode(calls):
    lstm = fastlstm.LSTM(5, 7).requires_grad_(False)
    assert not lstm(torch.randn(4, 3, 5))[0].requires_grad
    x = torch.randn(4, 3, 5, requires_grad=True)
    assert lstm(x)[0].requires_grad
    # The native call's five arguments, then the Function's seven and the weights.
    assert [len(arguments) for arguments in calls] == [5, 7 + 4]


def test_operands_of_any_strides():
    lstm = fastlstm.LSTM(5, 7, 2).requires_grad_(False)
    x, h, c = torch.randn(5, 6, 8), torch.randn(3, 7, 2), torch.randn(2, 7, 3)
    x, hx = x.permute(2, 1, 0)[::2, :3], (h.permute(2, 0, 1), c.transpose(1, 2))
    lstm.weight_hh_l0.data = lstm.weight_hh_l0.t().contiguous().t()
    found = flat(lstm(x, hx))
    same = flat(lstm(x.contiguous(), tuple(s.contiguous() for s in hx)))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


@torch.no_grad()
def test_weights_are_read_as_they_are_at_the_call():
    lstm, other = fastlstm.LSTM(5, 7), fastlstm.LSTM(5, 7)
    x = torch.randn(4, 3, 5)
    lstm(x)
    for change in ("written", "of other data", "replaced"):
        for p in other.parameters():
            p.add_(0.1)
        for name, p in list(other.named_parameters()):
            if change == "written":
                getattr(lstm, name).copy_(p)
            elif change == "of other data":
                getattr(lstm, name).data = p.clone()
            else:
                setattr(lstm, name, nn.Parameter(p.clone()))
        assert torch.equal(lstm(x)[0], other(x)[0]), change
    lstm.double()
    assert torch.equal(lstm(x.double())[0], other.double()(x.double())[0])


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        forward_ad.dual_level,
        SeesFunctions,
        SeesOperators,
        lambda: FakeTensorMode(allow_non_fake_inputs=True),
    ],
    ids=["autocast", "dual level", "functions", "operators", "fake tensors"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_modes_see_the_call_that_they_always_saw(grad, context, calls):
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(4, 3, 5)
    with torch.set_grad_enabled(grad):
        with context():
            lstm(x)
        assert not calls
        lstm(x)
        assert len(calls) == 1


class Subclass(torch.Tensor):
    pass


def of_a_subclass(lstm, x):
    return lstm(x.as_subclass(Subclass))


def state_of_a_subclass(lstm, x):
    return lstm(x, (torch.zeros(1, 3, 7).as_subclass(Subclass), torch.zeros(1, 3, 7)))


def under_vmap(lstm, x):
    return vmap(lambda x: lstm(x)[0])(x[None])


def traced(lstm, x):
    return torch.jit.trace(lstm, x, check_trace=False)


def compiled(lstm, x):
    return torch.compile(lstm, backend="eager")(x)


def exported(lstm, x):
    return torch.export.export(lstm, (x,)).module()(x)


def with_weights_from_elsewhere(lstm, x):
    return functional_call(lstm, {"weight_hh_l0": torch.ones(28, 7)}, (x,))


def parametrized(lstm, x):
    parametrize.register_parametrization(lstm, "weight_hh_l0", nn.Identity())
    return lstm(x)


def dropping(lstm, x):
    lstm.dropout = 0.5
    return lstm(x)


def with_lengths(lstm, x):
    return lstm(x, lengths=[4, 3, 1])


def with_cells(lstm, x):
    return lstm(x, return_cells=True)


def packed(lstm, x):
    return lstm(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 1])))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "call",
    [
        of_a_subclass, state_of_a_subclass, under_vmap, traced, compiled, exported,
        with_weights_from_elsewhere, parametrized, dropping, with_lengths, with_cells, packed,
    ],
)  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
def test_what_the_short_way_does_not_serve_takes_the_usual_one(grad, call, calls):
    with torch.set_grad_enabled(grad):
        call(fastlstm.LSTM(5, 7), torch.randn(4, 3, 5))
    assert not calls


def states(*sizes, dtype=torch.float32, device=None):
    return tuple(torch.zeros(size, dtype=dtype, device=device) for size in sizes)


X = torch.zeros(4, 3, 5)
MISTAKES = {
    "dimensions": (torch.zeros(4), None),
    "width": (torch.zeros(4, 3, 6), None),
    "input's dtype": (X.double(), None),
    "no steps": (torch.zeros(0, 3, 5), None),
    "index": (torch.full((4, 3), 5), None),
    "states' batch": (X, states((2, 2, 7), (2, 2, 7))),
    "states' width": (X, states((2, 3, 7), (2, 3, 8))),
    "states' form": (X, states((2, 7), (2, 7))),
    "as many elements in another shape": (X, states((3, 2, 7), (2, 3, 7))),
    "states' dtype": (X, states((2, 3, 7), (2, 3, 7), dtype=torch.float64)),
    "states' device": (X, states((2, 3, 7), (2, 3, 7), device="meta")),
    "input's device": (X.to("meta"), None),
    "three states": (X, states((2, 3, 7), (2, 3, 7), (2, 3, 7))),
    "no tuple": (X, torch.zeros(2, 2, 3, 7)),
    "sparse input": (X.to_sparse(), None),
    "complex input": (X.to(torch.complex64), None),
}


def errors_of(lstm, *arguments):
    """Kinds and texts: of the usual way, and of calls with a gradient and without."""
    errors = set()
    for grad, way in ((True, lambda *x: usual(lstm, *x)), (True, lstm), (False, lstm)):
        kinds = (ValueError, RuntimeError, TypeError, IndexError)
        with torch.set_grad_enabled(grad), pytest.raises(kinds) as raised:
            way(*arguments)
        errors.add((raised.type, str(raised.value)))
    return errors


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_the_same_words(name):
    lstm = fastlstm.LSTM(5, 7, 2)
    assert len(errors_of(lstm, *MISTAKES[name])) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lstm: setattr(lstm, "hidden_size", 8),
        lambda lstm: setattr(lstm, "input_size", 6),
        lambda lstm: setattr(lstm, "dropout", 2.0),
        lambda lstm: setattr(lstm, "weight_hh_l0", nn.Parameter(torch.zeros(28, 6))),
        lambda lstm: setattr(lstm, "bias_ih_l1", nn.Parameter(torch.zeros(28).double())),
        lambda lstm: setattr(lstm, "bias_hh_l0", nn.Parameter(torch.zeros(28, device="meta"))),
    ],
    ids=["hidden_size", "input_size", "dropout", "shape", "dtype", "device"],
)
def test_mistakes_in_the_module_are_told_in_the_same_words(spoil):
    lstm = fastlstm.LSTM(5, 7, 2)
    spoil(lstm)
    assert len(errors_of(lstm, X)) == 1


@torch.no_grad()
def test_a_batch_of_no_sequences_gives_no_rows():
    lstm = fastlstm.LSTM(5, 7, 2)
    output, (h_n, c_n) = plain.run_plain(lstm, torch.zeros(4, 0, 5), None)
    assert output.shape == (4, 0, 7)
    assert h_n.shape == c_n.shape == (2, 0, 7)


@torch.no_grad()
def test_the_memory_of_calls_is_kept_up_to_a_limit():
    def kept():
        torch.set_num_threads(1)
        small, large = fastlstm.LSTM(64, 64, 2), fastlstm.LSTM(1600, 1600)
        x, after = torch.zeros(10, 8, 64), []
        with torch.no_grad():
            for _ in range(2):
                large(torch.zeros(2, 8, 1600))  # packs two matrices of 39 MiB
                after.append(_C.kept_scratch())
            for _ in range(2):
                small(x)
                after.append(_C.kept_scratch())
        return after

    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as fresh:  # a thread that keeps nothing yet
        large, large_again, small, small_again = fresh.submit(kept).result()
    torch.set_num_threads(before)
    assert large[0] <= 64 << 20
    assert 78 << 20 <= large[1] <= 1 << 30
    assert large_again == large
    assert small_again == small  # the same blocks
