"""``fastlstm.prepack(lstm)``: a layer's inference with weights that were packed once."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastlstm
from fastlstm import _C
from fastlstm.packing import FrozenLSTM

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "three layers": {"num_layers": 3},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 9, "num_layers": 2},
    "batch first": {"batch_first": True},
    "zoneout": {"zoneout_h": 0.1, "zoneout_c": 0.2},
    "cell clip": {"cell_clip": 0.1},
    "layer norm": {"layer_norm": True, "num_layers": 2, "bidirectional": True},
    "of training": {"recurrent_dropout": 0.3, "weight_dropout": 0.3, "checkpoint_every": 2},
}
APART = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def flat(results):
    output, (h_n, c_n) = results
    return output, h_n, c_n


def check(found, expected):
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert not a.requires_grad
        assert (a - b).norm() <= APART[a.dtype] * (1 + b.norm())


def states(lstm, *batch):
    stack, dtype = lstm.stack, lstm.weight_ih_l0.dtype
    sizes = (stack.out_size, stack.hidden_size)
    return tuple(torch.randn(stack.pseudo_layers, *batch, n).to(dtype) for n in sizes)


def frozen_like(lstm):
    """The module packed, and itself without what is of training."""
    return fastlstm.prepack(lstm), lstm.eval().requires_grad_(False)


# Few rows and many: calls of the module read the weights as they stand, or pack them.
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (30, 9)])
def test_it_computes_what_the_lstm_computes(steps, batch, name, dtype, instruction_set):
    packed, lstm = frozen_like(fastlstm.LSTM(37, 35, **OPTIONS[name], dtype=dtype))
    leading = (batch, steps) if lstm.batch_first else (steps, batch)
    for x in (torch.randn(*leading, 37).to(dtype), torch.randint(37, leading)):
        check(packed(x), lstm(x))
        hx = states(lstm, batch)
        check(packed(x, hx), lstm(x, hx))
    for x in (torch.randn(steps, 37).to(dtype), torch.randint(37, (steps,), dtype=torch.int32)):
        hx = states(lstm)
        check(packed(x, hx), lstm(x, hx))


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_reads_sequences_of_every_length(bidirectional, index):
    packed, lstm = frozen_like(fastlstm.LSTM(6, 8, 2, bidirectional=bidirectional))
    rows = [torch.randint(6, (n,)) if index else torch.randn(n, 6) for n in (3, 7, 1, 5)]
    sequence, hx = pack_sequence(rows, enforce_sorted=False), states(lstm, 4)
    for given in (None, hx):
        (found, state), (expected, same) = packed(sequence, given), lstm(sequence, given)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(state, same)
    x = torch.zeros(4, 7, dtype=torch.int64) if index else torch.zeros(4, 7, 6)
    for row, of in zip(x, rows, strict=True):
        row[: len(of)] = of
    x = x.transpose(0, 1)
    expected = lstm(x, hx, lengths=[3, 7, 1, 5])
    torch.testing.assert_close(packed(x, hx, lengths=[3, 7, 1, 5]), expected)


def test_it_is_a_copy_that_the_parameters_no_longer_reach():
    packed, lstm = frozen_like(fastlstm.LSTM(5, 7))
    x = torch.randn(4, 3, 5)
    before = packed(x)[0]
    for p in lstm.parameters():
        p.data.add_(1)
    assert torch.equal(packed(x)[0], before)
    del lstm, p
    gc.collect()
    assert torch.equal(packed(x)[0], before)
    again = copy.deepcopy(packed)
    del packed
    gc.collect()
    assert torch.equal(again(x)[0], before)


def test_it_is_freed_with_the_last_that_uses_it():
    packed = fastlstm.prepack(fastlstm.LSTM(5, 7))
    handle = packed._weights.handle
    x = torch.randn(4, 3, 5)
    call = torch.ops.fastlstm._infer_packed
    assert call(x, None, None, handle, False)[0] is not None
    del packed
    gc.collect()
    assert call(x, None, None, handle, False) == (None, None, None)
    with pytest.raises(RuntimeError, match=f"no packed weights of handle {handle}"):
        torch.ops.fastlstm._forward_packed(x, None, None, None, handle, [1, 1, 7, 7, 0])


def test_it_stands_in_a_model_for_the_lstm_that_it_was_made_of():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 7, 2, batch_first=True, dropout=0.5)
            self.head = nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model, x = Model().eval(), torch.randn(3, 20, 5)
    with torch.no_grad():
        expected = model(x)
        model.lstm = fastlstm.prepack(model.lstm)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.train()(x), expected)  # it drops nothing
    assert list(model.state_dict()) == ["head.weight", "head.bias"]
    assert repr(model.lstm) == "FrozenLSTM(5, 7, num_layers=2, batch_first=True, torch.float32)"


def test_it_keeps_the_instruction_set_that_packed_it(instruction_set):
    packed, lstm = frozen_like(fastlstm.LSTM(33, 35))
    x = torch.randn(9, 4, 33)
    expected = packed(x)[0]
    _C.cpu_select("baseline")
    assert torch.equal(packed(x)[0], expected)
    torch.testing.assert_close(lstm(x)[0], expected)


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (20, 5)])
def test_its_results_do_not_depend_on_the_threads(steps, batch):
    before = torch.get_num_threads()
    packed, x = fastlstm.prepack(fastlstm.LSTM(300, 300, 2)), torch.randn(steps, batch, 300)
    try:
        torch.set_num_threads(1)
        expected = flat(packed(x))
        torch.set_num_threads(3)
        found = flat(packed(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_several_threads_may_call_it_while_others_pack_and_free():
    lstm = fastlstm.LSTM(9, 20)
    packed, x = fastlstm.prepack(lstm), torch.randn(12, 3, 9)
    expected = packed(x)[0]

    def call(_):
        fastlstm.prepack(lstm)
        return torch.equal(packed(x)[0], expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


def test_a_compiled_graph_calls_it():
    packed, lstm = frozen_like(fastlstm.LSTM(5, 7, 2))
    x, indices = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    sequence = pack_padded_sequence(x, torch.tensor([4, 3, 1]))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for given in ((x,), (indices,), (x, states(lstm, 3)), (sequence, states(lstm, 3))):
        (found, state), (expected, same) = compiled(*given), packed(*given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(state, same)
    outside = torch.compile(packed, backend="aot_eager")  # the graph breaks for lengths
    torch.testing.assert_close(outside(x, lengths=[4, 3, 1]), packed(x, lengths=[4, 3, 1]))
    with pytest.raises(NotImplementedError, match="lengths that can be read"):
        torch.func.vmap(lambda n: packed(x, lengths=n)[0])(torch.tensor([[4, 3, 1]]))


def test_autocast_leaves_it_its_dtype():
    packed = fastlstm.prepack(fastlstm.LSTM(5, 7))
    x, hx = torch.randn(4, 3, 5), (torch.randn(1, 3, 7), torch.randn(1, 3, 7))
    expected = packed(x.bfloat16().float(), hx)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed(x.bfloat16(), hx)
    torch.testing.assert_close(found, expected)


def test_what_needs_a_gradient_is_refused():
    packed = fastlstm.prepack(fastlstm.LSTM(5, 7))
    x = torch.randn(4, 3, 5, requires_grad=True)
    hx = (torch.zeros(1, 3, 7, requires_grad=True), torch.zeros(1, 3, 7))
    for given in ((x,), (pack_padded_sequence(x, torch.tensor([4, 3, 1])),)):
        with pytest.raises(RuntimeError, match=r"^input requires a gradient"):
            packed(*given)
    with pytest.raises(RuntimeError, match=r"^hx requires a gradient"):
        packed(x.detach(), hx)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"^input requires a gradient"):
            packed(dual)
    with pytest.raises(RuntimeError, match=r"^input requires a gradient"):
        torch.func.grad(lambda x: packed(x)[0].sum())(x.detach())
    with torch.no_grad():
        assert not packed(x, hx)[0].requires_grad


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.zeros(4),), {}),
        ((torch.zeros(4, 3, 6),), {}),
        ((torch.zeros(4, 3, 5).double(),), {}),
        ((torch.zeros(0, 3, 5),), {}),
        ((torch.full((4, 3), 5),), {}),
        ((torch.zeros(4, 3, 5), (torch.zeros(1, 2, 7), torch.zeros(1, 3, 7))), {}),
        ((torch.zeros(4, 3, 5), torch.zeros(2, 1, 3, 7)), {}),
        ((torch.zeros(4, 3, 5, device="meta"),), {}),
        ((torch.zeros(4, 3, 5),), {"lengths": [5, 1, 1]}),
        ((pack_sequence([torch.zeros(2, 5)]),), {"lengths": [2]}),
    ],
)
def test_mistakes_are_told_in_the_lstms_words(args, kwargs):
    lstm = fastlstm.LSTM(5, 7)
    errors = []
    for module in (lstm, fastlstm.prepack(lstm)):
        with pytest.raises((ValueError, RuntimeError, TypeError, IndexError)) as raised:
            module(*args, **kwargs)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: fastlstm.prepack(nn.GRU(3, 4)), TypeError, "lstm must be .* got GRU"),
        (lambda: fastlstm.prepack(nn.Linear(3, 4)), TypeError, "lstm must be .* got Linear"),
        (
            lambda: fastlstm.prepack(fastlstm.LSTM(3, 4), weights="bf16"),
            ValueError,
            "weights: expected None without a decoder.* got 'bf16'",
        ),
        (
            lambda: fastlstm.prepack(fastlstm.LSTM(3, 4, device="meta")),
            RuntimeError,
            "lstm must be on the CPU .* got meta",
        ),
        (
            lambda: fastlstm.prepack(fastlstm.LSTM(3, 4, dtype=torch.complex64)),
            RuntimeError,
            "cannot be packed: there are no kernels for torch.complex64",
        ),
        (
            lambda: pickle.dumps(fastlstm.prepack(fastlstm.LSTM(3, 4))),
            TypeError,
            "packed weights cannot be pickled",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_what_cannot_be_packed_is_refused(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_with_a_decoder_it_packs_for_generate():
    lstm, decoder = fastlstm.LSTM(5, 7), nn.Linear(7, 5)
    assert isinstance(fastlstm.prepack(lstm), FrozenLSTM)
    packed = fastlstm.prepack(lstm, decoder, weights="bf16")
    assert isinstance(packed, fastlstm.packing.PackedLSTM)
    assert packed.weights == "bf16"
