"""functional.lstm: one call for the stack, its checks, its seed, and devices without kernels."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import functional, modules
from fastlstm.ops import dispatch, native

X = torch.linspace(-1, 1, 24).view(4, 2, 3)


def stack(**options):
    module = nn.LSTM(3, 6, **options)
    options = {k: v for k, v in options.items() if k != "dtype"}
    return module, list(module.parameters()), options


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "bias": False, "proj_size": 2, "batch_first": True},
        {"proj_size": 5, "bidirectional": True},
    ],
)
def test_equals_the_module(options):
    module, weights, options = stack(**options)
    for x in (X, X[:, 0]):
        torch.testing.assert_close(functional.lstm(x, None, weights, **options), module(x))
    state = [torch.randn_like(s) for s in module(X)[1]]
    torch.testing.assert_close(
        functional.lstm(X, state, weights, **options), module(X, tuple(state))
    )


def test_packed_rows():
    module, weights, options = stack(num_layers=2)
    packed = pack_padded_sequence(X, torch.tensor([4, 2]))
    output, state = functional.lstm(
        packed.data, None, weights, **options, batch_sizes=packed.batch_sizes
    )
    expected, expected_state = module(packed)
    torch.testing.assert_close((output, state), (expected.data, expected_state))


def test_a_given_seed_decides_what_is_dropped():
    _, weights, options = stack(num_layers=2)

    def run(seed, **more):
        seed = None if seed is None else torch.tensor([seed])
        return functional.lstm(
            X, None, weights, **options, dropout=0.5, training=True, seed=seed, **more
        )[0]

    state = torch.get_rng_state()
    assert torch.equal(run(7), run(7))
    assert not torch.equal(run(7), run(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(run(None), run(None))


def test_seed_is_unused_where_nothing_is_dropped():
    _, weights, options = stack(num_layers=2)
    expected = functional.lstm(X, None, weights, **options)
    for more in ({"dropout": 0.5}, {"dropout": 0.0, "training": True}):
        found = functional.lstm(X, None, weights, **options, **more, seed=torch.tensor([1]))
        torch.testing.assert_close(found, expected)


ERRORS = {
    "too few weights": (
        lambda w: functional.lstm(X, None, w, num_layers=2),
        RuntimeError,
        "expected 8 weights for these options, got 4",
    ),
    "a bias too many": (
        lambda w: functional.lstm(X, None, w, bias=False),
        RuntimeError,
        "expected 2 weights for these options, got 4",
    ),
    "first weight 1-D": (
        lambda w: functional.lstm(X, None, w[::-1]),
        RuntimeError,
        r"weights\[0\] \(weight_ih_l0\) must be 2-D, got 1-D",
    ),
    "rows not a multiple of four": (
        lambda w: functional.lstm(X, None, [t[:-1] for t in w]),
        RuntimeError,
        r"weight_ih_l0 must have shape \(20, 3\), got \(23, 3\)",
    ),
    "weights in another order": (
        lambda w: functional.lstm(X, None, [w[0], w[2], w[1], w[3]]),
        RuntimeError,
        r"weight_hh_l0 must have shape \(24, 6\), got \(24,\)",
    ),
    "num_layers zero": (
        lambda w: functional.lstm(X, None, w, num_layers=0),
        ValueError,
        "num_layers must be greater than zero",
    ),
    "proj_size negative": (
        lambda w: functional.lstm(X, None, w, proj_size=-1),
        ValueError,
        "proj_size should be a positive integer",
    ),
    "proj_size too large": (
        lambda w: functional.lstm(X, None, [*w, w[0]], proj_size=6),
        ValueError,
        "proj_size has to be smaller than hidden_size",
    ),
    "dropout out of range": (
        lambda w: functional.lstm(X, None, w, dropout=1.5),
        ValueError,
        "dropout should be a number in range",
    ),
    "seed of two": (
        lambda w: functional.lstm(
            X, None, w * 2, num_layers=2, dropout=0.5, training=True, seed=torch.tensor([1, 2])
        ),
        RuntimeError,
        "seed must be one int64 element on cpu, got torch.int64 of shape",
    ),
    "seed of another type": (
        lambda w: functional.lstm(
            X, None, w * 2, num_layers=2, dropout=0.5, training=True, seed=torch.ones(1)
        ),
        RuntimeError,
        "seed must be one int64 element on cpu, got torch.float32",
    ),
    "batch_sizes on another device": (
        lambda w: functional.lstm(
            X.flatten(0, 1), None, w, batch_sizes=torch.tensor([4, 4], device="meta")
        ),
        RuntimeError,
        "batch_sizes must be an int64 tensor on the CPU, got torch.int64 on meta",
    ),
    "one bias of a cell": (
        lambda w: functional.lstm_cell(X[0], None, w[0], w[1], w[2]),
        RuntimeError,
        "both b_ih and b_hh",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case):
    call, kind, text = ERRORS[case]
    weights = list(nn.LSTM(3, 6).parameters())
    if "seed" in case:  # two layers, of equal shapes
        weights = list(nn.LSTM(3, 3).parameters())
    with pytest.raises(kind, match=text) as info:
        call(weights)
    assert info.type is kind


# Where there are no kernels ------------------------------------------------------------------


@pytest.fixture
def _no_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "kernels_missing", lambda like: "of a reason")
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(modules, "run_plain", lambda *call: None)  # it asks no one


@pytest.mark.usefixtures("_no_kernels")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.filterwarnings("ignore:fastlstm runs torch's own LSTM")
@pytest.mark.parametrize("form", ["dense", "index", "packed", "packed index", "unbatched"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_torchs_own_lstm_runs_where_there_are_no_kernels(form, proj_size, monkeypatch):
    lstm = fastlstm.LSTM(7, 5, 2, bidirectional=True, proj_size=proj_size)
    x = torch.randint(7, (4, 3)) if "index" in form else torch.randn(4, 3, 7)
    if "packed" in form:
        x = pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False)
    x = x[:, 0] if form == "unbatched" else x
    y, state = lstm(x)
    monkeypatch.undo()
    expected, expected_state = lstm(x)
    if "packed" in form:
        y, expected = y.data, expected.data
    torch.testing.assert_close((y, state), (expected, expected_state))


@pytest.mark.usefixtures("_no_kernels")
def test_that_is_said_once():
    lstm = fastlstm.LSTM(3, 5)
    with pytest.warns(UserWarning, match="torch's own LSTM here: of a reason"):
        lstm(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm(X)


@pytest.mark.usefixtures("_no_kernels")
@pytest.mark.filterwarnings("ignore:fastlstm runs torch's own LSTM")
def test_dropout_there_is_torchs_and_refuses_a_seed():
    lstm = fastlstm.LSTM(3, 50, 2, dropout=0.5)
    assert not torch.equal(lstm(X)[0], lstm(X)[0])
    lstm.eval()
    assert torch.equal(lstm(X)[0], lstm(X)[0])
    lstm(X)[0].sum().backward()
    with pytest.raises(NotImplementedError, match="given seed needs fastlstm's kernels"):
        functional.lstm(
            X,
            None,
            list(lstm.parameters()),
            num_layers=2,
            dropout=0.5,
            training=True,
            seed=torch.tensor([1]),
        )


def test_which_tensors_have_kernels():
    missing = native.kernels_missing
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert missing(torch.zeros(1, dtype=dtype)) is None
        assert missing(torch.zeros(1, dtype=dtype, device="meta")) is None
    assert missing(torch.zeros(1, dtype=torch.complex64)) == (
        "there are no kernels for torch.complex64"
    )


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), "7.5;8.0;9.0a;10.0a+PTX", False),
        ((7, 5), "7.5;8.0;9.0a;10.0a+PTX", True),
        ((8, 9), "7.5;8.0;9.0a;10.0a+PTX", True),
        ((12, 0), "7.5;8.0;9.0a;10.0a+PTX", True),  # by its PTX
        ((9, 0), "7.5;8.0;9.0a", True),
        ((9, 1), "9.0a", False),
        ((8, 0), "8.6, 9.0", False),
        ((11, 0), "9.0a+PTX", True),
        ((10, 3), "10.0a", False),
        ((10, 3), "10.0f", True),
    ],
)
def test_gpus_without_an_image_of_the_kernels_get_torchs_lstm(
    capability, architectures, runs, monkeypatch
):
    monkeypatch.setattr(native, "_C_cuda", SimpleNamespace(architectures=architectures))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    native._missing_on_gpu.cache_clear()
    like = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 3))
    said = native.kernels_missing(like)
    torch.compiler.reset()  # another case's constant
    compiled = torch.compile(
        lambda x: x + (native.missing_on_gpu(3) is None), backend="eager", fullgraph=True
    )
    found = compiled(torch.zeros(1)).item()
    native._missing_on_gpu.cache_clear()
    assert (said is None) == runs
    assert found == runs
    if not runs:
        number = f"{capability[0]}.{capability[1]}"
        assert said == (
            f"the CUDA kernels were built for {architectures}, "
            f"not for a GPU of compute capability {number}"
        )


@pytest.mark.filterwarnings("ignore:fastlstm runs torch's own LSTM")
def test_complex_weights_work_as_in_nn_lstm():
    theirs = nn.LSTM(3, 5, 2, dtype=torch.complex64)
    ours = fastlstm.from_torch(theirs)
    x = torch.randn(4, 2, 3, dtype=torch.complex64)
    torch.testing.assert_close(ours(x), theirs(x))
