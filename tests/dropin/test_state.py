"""Parameters, attributes and copies of the module are those of nn.LSTM, in every way of use."""

import contextlib
import copy
import importlib
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence

import fastlstm

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
    # Of nn.LSTM, in the tests that replace a weight.
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
]

ALL = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
VARIANTS = [
    {},
    {"bias": False},
    {"num_layers": 3, "batch_first": True, "dropout": 0.25},
    {"bidirectional": True},
    ALL,
    {**ALL, "bias": False, "dtype": torch.float64},
]
X = torch.linspace(-1, 1, 24).view(4, 2, 3)


def same(a, b):
    torch.testing.assert_close(a(X), b(X))


@pytest.mark.parametrize("options", VARIANTS)
def test_is_made_as_nn_lstm_is(options):
    """Same random numbers, names, shapes, order and attributes from the same arguments."""
    torch.manual_seed(3)
    theirs = nn.LSTM(3, 5, **options)
    torch.manual_seed(3)
    ours = fastlstm.LSTM(3, 5, **options)
    assert repr(ours) == f"fastlstm.{theirs!r}"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, p), (their_name, q) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == their_name
        assert torch.equal(p, q)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [[id(w) for w in ws] for ws in ours.all_weights] == [
        [id(getattr(ours, n)) for n in names] for names in theirs._all_weights
    ]
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    for name in nn.LSTM.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert {n for n in dir(theirs) if not n.startswith("__")} <= set(dir(ours))
    assert isinstance(ours, nn.modules.rnn.RNNBase)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_goes_both_ways(options, assign):
    theirs, ours = nn.LSTM(3, 5, **options), fastlstm.LSTM(3, 5, **options)
    x = X.to(theirs.weight_ih_l0.dtype)
    assert ours.load_state_dict(theirs.state_dict(), strict=True, assign=assign) == ([], [])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    back = nn.LSTM(3, 5, **options).eval()
    ours.reset_parameters()
    assert back.load_state_dict(ours.state_dict(), strict=True, assign=assign) == ([], [])
    torch.testing.assert_close(back(x), ours(x))


def test_strict_loading_names_what_is_wrong():
    with pytest.raises(RuntimeError, match=r"Missing key.*bias_hh_l1"):
        fastlstm.LSTM(3, 5, 2).load_state_dict(nn.LSTM(3, 5).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        fastlstm.LSTM(3, 5).load_state_dict(nn.LSTM(4, 5).state_dict())


def _torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _torch_save]
)
@pytest.mark.parametrize("options", VARIANTS[:-1])
def test_copies_compute_the_same_and_share_nothing(options, duplicate):
    ours = fastlstm.LSTM(3, 5, **options).eval()
    ours(X)
    twin = duplicate(ours)
    assert type(twin) is fastlstm.LSTM
    same(twin, ours)
    before = ours(X)[0]
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    torch.testing.assert_close(ours(X)[0], before, rtol=0, atol=0)
    assert not torch.equal(twin(X)[0], before)
    assert all(a is b for a, b in zip(twin._flat_weights, twin.parameters(), strict=True))


def test_copies_a_module_whose_weights_carry_a_graph():
    """deepcopy after functional_call, which leaves an nn.LSTM with graph tensors in a cache."""
    ours = fastlstm.LSTM(3, 5)
    weights = {n: p * 2 for n, p in ours.named_parameters()}
    functional_call(ours, weights, (X,))
    same(copy.deepcopy(ours), ours)


@pytest.mark.parametrize("options", VARIANTS[:-1])
def test_meta_device_and_to_empty(options):
    theirs = nn.LSTM(3, 5, **options).eval()
    ours = fastlstm.LSTM(3, 5, **options, device="meta").eval()
    (y, state), (expected, expected_state) = ours(X.to("meta")), theirs(X)
    assert y.is_meta
    assert [t.shape for t in (y, *state)] == [t.shape for t in (expected, *expected_state)]
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    same(ours, theirs)
    with torch.device("meta"):
        late = fastlstm.LSTM(3, 5, **options).eval()
    assert late.weight_ih_l0.is_meta
    late.load_state_dict(theirs.state_dict(), assign=True)
    same(late, theirs)


@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_of_any_length_on_the_meta_device(batch_first):
    options = {"num_layers": 2, "batch_first": batch_first, "device": "meta"}
    ours, theirs = fastlstm.LSTM(3, 5, **options), nn.LSTM(3, 5, **options)
    sizes = torch.tensor([3, 3, 1])
    packed = PackedSequence(torch.empty(7, 3, device="meta"), sizes)
    (y, state), (expected, expected_state) = ours(packed), theirs(packed)
    assert [t.shape for t in (y.data, *state)] == [
        t.shape for t in (expected.data, *expected_state)
    ]
    y.data.sum().backward()
    assert ours.weight_hh_l0.grad.is_meta
    x = torch.empty((3, 4, 3) if batch_first else (4, 3, 3), device="meta")
    y, (h_n, _), cells = ours(x, lengths=[4, 1, 2], return_cells=True)
    assert y.is_meta
    assert [t.shape for t in (y, h_n, cells)] == [
        (*x.shape[:2], 5), (2, 3, 5), (2, *x.shape[:2], 5)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_of_the_dtype(dtype):
    ours = fastlstm.LSTM(3, 5, 2)
    exact = ours(X)[0]
    assert ours.to(dtype) is ours
    assert all(w.dtype == dtype for w in ours._flat_weights)
    y = ours(X.to(dtype))[0]
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=2e-2)


def test_flatten_parameters_changes_nothing():
    ours = fastlstm.LSTM(3, 5, 2)
    before, pointers = ours(X), [p.data_ptr() for p in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert [p.data_ptr() for p in ours.parameters()] == pointers
    torch.testing.assert_close(ours(X), before, rtol=0, atol=0)


@pytest.fixture
def flattened(monkeypatch):
    """Every tensor says that it is on a GPU; the arguments of every call of cuDNN's flattening."""
    calls = []

    def flatten(weights, per_cell, input_size, mode, hidden_size, proj_size, layers, first, both):
        assert len(weights) == per_cell * layers * (1 + both)  # torch asserts it, too
        calls.append([w.shape for w in weights])

    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda _: True)
    of_rnns = importlib.import_module("torch.backends.cudnn.rnn")  # an attribute may hide it
    monkeypatch.setattr(of_rnns, "get_cudnn_mode", lambda _: 2)
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    return calls


@pytest.mark.parametrize("options", VARIANTS)
def test_weights_are_flattened_for_cudnn_as_nn_lstms(options, flattened):
    nn.LSTM(3, 5, **options).double()
    expected = list(flattened)
    flattened.clear()
    fastlstm.LSTM(3, 5, **options).double()
    assert len(expected) == 2  # made, and moved
    assert flattened == expected


def test_a_layer_normalised_stack_moves_to_a_gpu(flattened):
    """cuDNN's flattening, which knows no gains, is not asked."""
    lstm = fastlstm.LSTM(3, 5, 2, bidirectional=True, layer_norm=True)
    flattened.clear()
    moved = copy.deepcopy(lstm).double()
    moved.flatten_parameters()
    assert flattened == []
    assert all(a is b for a, b in zip(moved._flat_weights, moved.parameters(), strict=True))
    assert len(moved._flat_weights) == 2 * 2 * 8
    assert moved.norm_c_l1_reverse.dtype == torch.float64


def test_an_assigned_parameter_is_used_and_listed():
    theirs, ours = nn.LSTM(3, 5), fastlstm.LSTM(3, 5)
    for m in (theirs, ours):
        for name, p in list(m.named_parameters()):
            setattr(m, name, nn.Parameter(torch.full_like(p, 0.25)))
    same(ours, theirs)
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_a_non_contiguous_weight_is_read_as_it_is():
    theirs, ours = nn.LSTM(3, 5), fastlstm.LSTM(3, 5)
    with torch.no_grad():
        weight = theirs.weight_hh_l0.t().contiguous().t()
    assert not weight.is_contiguous()
    ours.load_state_dict(theirs.state_dict())
    ours.weight_hh_l0 = nn.Parameter(weight)
    same(ours, theirs)


class WeightDrop(nn.Module):
    """As in AWD-LSTM: the raw weight is a parameter, the used one a plain, dropped tensor."""

    def __init__(self, lstm, by_registry):
        super().__init__()
        self.lstm, self.by_registry = lstm, by_registry
        raw = lstm.weight_hh_l0
        self.raw = nn.Parameter(raw.data)
        del lstm._parameters["weight_hh_l0"]

    def forward(self, x):
        used = F.dropout(self.raw, 0.5, self.training)
        if self.by_registry:  # fastai's later way
            self.lstm._parameters["weight_hh_l0"] = used
            self.lstm._flat_weights[1] = used
        else:
            self.lstm.weight_hh_l0 = used
        return self.lstm(x)


@pytest.mark.parametrize("by_registry", [False, True])
def test_weight_drop(by_registry):
    theirs, ours = nn.LSTM(3, 5), fastlstm.LSTM(3, 5)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for lstm in (theirs, ours):
        model = WeightDrop(lstm, by_registry)
        torch.manual_seed(1)
        outputs = [model(X)[0] for _ in range(3)]
        assert not torch.equal(outputs[0], outputs[1])
        sum(y.sum() for y in outputs).backward()
        results.append([*outputs, model.raw.grad, lstm.weight_ih_l0.grad])
    torch.testing.assert_close(results[1], results[0])


def _old_weight_norm(m):
    nn.utils.weight_norm(m, "weight_hh_l0")


def _weight_norm(m):
    parametrizations.weight_norm(m, "weight_hh_l0")


def _orthogonal(m):
    parametrizations.orthogonal(m, "weight_hr_l0")


def _pruned(m):
    prune.l1_unstructured(m, "weight_ih_l0", 0.5)


@pytest.mark.parametrize("change", [_old_weight_norm, _weight_norm, _orthogonal, _pruned])
def test_reparametrised_weights_train_as_in_nn_lstm(change):
    theirs = nn.LSTM(3, 5, proj_size=2)
    ours = fastlstm.LSTM(3, 5, proj_size=2)
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for m in (theirs, ours):
        torch.manual_seed(0)
        change(m)
        optimizer = torch.optim.SGD(m.parameters(), 0.5)
        losses.append([])
        for _ in range(5):
            loss = m(X)[0].square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]


def test_removed_parametrization_leaves_a_plain_module():
    ours = fastlstm.LSTM(3, 5)
    before = ours(X)
    parametrizations.weight_norm(ours, "weight_hh_l0")
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is fastlstm.LSTM
    torch.testing.assert_close(ours(X), before)


def test_a_replica_of_data_parallel():
    """Its weights are plain tensors that carry the gradient to the original's."""
    ours = fastlstm.LSTM(3, 5)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p * 1)
    same(replica, ours)
    replica(X)[0].sum().backward()
    assert ours.weight_hh_l0.grad.any()
    assert ours._flat_weights[0] is ours.weight_ih_l0


def test_functional_call():
    theirs, ours = nn.LSTM(3, 5, 2), fastlstm.LSTM(3, 5, 2)
    weights = {n: (p.detach() * 3).requires_grad_() for n, p in theirs.named_parameters()}
    before = ours(X)
    y, state = functional_call(ours, weights, (X,))
    torch.testing.assert_close((y, state), functional_call(theirs, weights, (X,)))
    torch.testing.assert_close(ours(X), before, rtol=0, atol=0)
    y.sum().backward()
    assert all(w.grad is not None for w in weights.values())
    assert all(p.grad is None for p in ours.parameters())


def test_func_grad():
    ours = fastlstm.LSTM(3, 5, 2)
    weights = {n: p.detach() for n, p in ours.named_parameters()}
    grads = torch.func.grad(lambda w: functional_call(ours, w, (X,))[0].sum())(weights)
    ours(X)[0].sum().backward()
    torch.testing.assert_close(grads, {n: p.grad for n, p in ours.named_parameters()})


def test_hooks_fire():
    ours, seen = fastlstm.LSTM(3, 5), []
    ours.register_forward_pre_hook(lambda m, args: seen.append("before"))
    ours.register_forward_hook(lambda m, args, result: seen.append(result[0].shape))
    ours.register_full_backward_hook(lambda m, grad_input, grad: seen.append("backward"))
    ours(X.clone().requires_grad_())[0].sum().backward()
    assert seen == ["before", (4, 2, 5), "backward"]


def test_frozen_parameters_and_inputs_get_no_gradient(outcome):
    ours = fastlstm.LSTM(3, 5, 2)
    expected = outcome(ours, X)
    names = [n for n, _ in ours.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    for frozen in itertools.combinations(names, 2):
        for n, p in ours.named_parameters():
            p.requires_grad_(n not in frozen)
            p.grad = None
        y, (h_n, c_n) = ours(X)
        generator.manual_seed(1)
        arriving = [torch.randn(t.shape, generator=generator) for t in (y, h_n, c_n)]
        torch.autograd.backward((y, h_n, c_n), arriving)
        for n, p in ours.named_parameters():
            if n in frozen:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, expected[f"grad {n}"])
    ours.requires_grad_(False)
    assert not ours(X)[0].requires_grad
    x = X.clone().requires_grad_()
    ours(x)[0].sum().backward()
    assert x.grad is not None


def test_gradient_of_a_single_output():
    theirs, ours = nn.LSTM(3, 5, 2), fastlstm.LSTM(3, 5, 2)
    ours.load_state_dict(theirs.state_dict())
    for pick in (lambda y, s: y[-1], lambda y, s: s[0], lambda y, s: s[1][0]):
        grads = [torch.autograd.grad(pick(*m(X)).sum(), m.weight_ih_l0)[0] for m in (theirs, ours)]
        torch.testing.assert_close(grads[1], grads[0])


def test_inference_mode_and_no_grad():
    theirs, ours = nn.LSTM(3, 5, 2), fastlstm.LSTM(3, 5, 2)
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        y, _ = ours(X)
        assert y.is_inference()
        torch.testing.assert_close(y, theirs(X)[0])
    with torch.no_grad():
        assert not ours(X)[0].requires_grad


def test_backward_in_evaluation():
    theirs, ours = nn.LSTM(3, 5, 2, dropout=0.5), fastlstm.LSTM(3, 5, 2, dropout=0.5)
    ours.load_state_dict(theirs.state_dict())
    for m in (theirs, ours):
        m.eval()(X)[0].sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_state_passed_on_equals_one_long_sequence():
    ours = fastlstm.LSTM(3, 5, 2)
    y, state = ours(X)
    hx, steps = None, []
    for x in X:
        out, hx = ours(x[None], hx)
        steps.append(out)
    torch.testing.assert_close((torch.cat(steps), hx), (y, state))
