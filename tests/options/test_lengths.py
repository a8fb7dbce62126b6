"""``lengths=``: padded input whose sequences end early equals packing and padding again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import checks


def by_packing(module, x, lengths, hx=None):
    packed = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    output, state = module(packed, hx)
    steps = x.shape[1 if module.batch_first else 0]
    return pad_packed_sequence(output, module.batch_first, total_length=steps)[0], state


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bidirectional": True, "num_layers": 2},
        {"proj_size": 3, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
def test_lengths_equal_nn_lstm_on_packed_input(options, states, twins, assert_close):
    theirs, ours = twins(5, 7, **options)
    lengths = torch.tensor([3, 6, 1, 6, 2])
    x = torch.randn(5, 6, 5) if ours.batch_first else torch.randn(6, 5, 5)
    cells = ours.num_layers * (1 + ours.bidirectional)
    hx = (torch.randn(cells, 5, ours.proj_size or 7), torch.randn(cells, 5, 7)) if states else None

    def outcome(run):
        leaf = x.clone().requires_grad_()
        output, (h_n, c_n) = run(leaf)
        (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        return {"output": output, "h_n": h_n, "c_n": c_n, "grad": leaf.grad}

    found = outcome(lambda x: ours(x, hx, lengths=lengths))
    assert_close(found, outcome(lambda x: by_packing(theirs, x, lengths, hx)), 1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True, "num_layers": 2, "batch_first": True},
        {"proj_size": 3, "bidirectional": True, "num_layers": 3},
        {"bias": False},
        {"num_layers": 2, "dropout": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("states", [False, True])
def test_lengths_that_are_not_read_give_the_same(options, states, monkeypatch, assert_close):
    """As on a GPU: the host does not look at them."""
    lstm = fastlstm.LSTM(5, 7, **options).double()
    lengths = torch.tensor([3, 6, 1, 6, 2])
    x = torch.randn((5, 6, 5) if lstm.batch_first else (6, 5, 5), dtype=torch.float64)
    cells = lstm.num_layers * (1 + lstm.bidirectional)
    sizes = lstm.proj_size or 7, 7
    hx = tuple(torch.randn(cells, 5, n).double() for n in sizes) if states else None

    def outcome():
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        output, (h_n, c_n) = lstm(leaf, hx, lengths=lengths)
        loss = output.square().sum() + h_n.sum() + c_n.square().sum()
        grads = torch.autograd.grad(loss, [leaf, *lstm.parameters()])
        named = {f"grad {j}": grad for j, grad in enumerate(grads)}
        return {"output": output, "h_n": h_n, "c_n": c_n, **named}

    expected = outcome()
    monkeypatch.setattr(checks, "readable", lambda x: x.is_floating_point())
    found = outcome()
    if not options.get("dropout"):  # packed sequences are numbered in another order
        assert_close(found, expected, 1e-10)
    alone = lstm.eval()(x, hx, lengths=lengths)[0]
    x[(slice(None), slice(3, None)) if lstm.batch_first else (slice(3, None), 0)] = torch.nan
    rows = (0, slice(0, 3)) if lstm.batch_first else (slice(0, 3), 0)
    assert torch.equal(lstm(x, hx, lengths=lengths)[0][rows], alone[rows])


def test_lengths_in_one_compiled_graph():
    lstm, lengths = fastlstm.LSTM(3, 4, bidirectional=True), torch.tensor([5, 2])
    x = torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, n: lstm(x, lengths=n), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, lengths), lstm(x, lengths=lengths))


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"zoneout_h": 0.2}], ids=str)
def test_options_that_read_lengths_break_the_graph(options):
    lstm, x = fastlstm.LSTM(3, 4, **options), torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, n: lstm(x, lengths=n), backend="aot_eager")
    results = []
    for run in (compiled, lambda x, n: lstm(x, lengths=n)):
        torch.manual_seed(0)
        results.append(run(x, torch.tensor([5, 2])))
    torch.testing.assert_close(*results)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.booleans())
def test_drawn_lengths_of_indices(lengths, bidirectional):
    lstm = fastlstm.LSTM(9, 4, bidirectional=bidirectional)
    x = torch.randint(9, (7, len(lengths)))
    output, (h_n, c_n) = lstm(x, lengths=lengths)
    for b, n in enumerate(lengths):
        alone, (h, c) = lstm(x[:n, b])
        torch.testing.assert_close(output[:n, b], alone)
        assert not output[n:, b].any()
        torch.testing.assert_close((h_n[:, b], c_n[:, b]), (h, c))


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_forms_of_lengths(kind):
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = by_packing(lstm, x, torch.tensor([5, 2]))[0]
    assert torch.equal(lstm(x, lengths=kind([5, 2]))[0], expected)


@pytest.mark.parametrize("lengths", [[], torch.empty(0, dtype=torch.int64)], ids=["list", "tensor"])
def test_lengths_of_no_sequences(lengths):
    lstm = fastlstm.LSTM(3, 4, 2, bidirectional=True)
    output, (h_n, c_n), cells = lstm(torch.empty(5, 0, 3), lengths=lengths, return_cells=True)
    assert [t.shape for t in (output, h_n, c_n, cells)] == [
        (5, 0, 8), (4, 0, 4), (4, 0, 4), (4, 5, 0, 4)
    ]  # fmt: skip
    output.sum().backward()
    assert not lstm.weight_hh_l0.grad.any()


def test_what_lies_beyond_the_end_is_not_read():
    lstm, x = fastlstm.LSTM(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    expected = lstm(x, lengths=[2, 3])
    x[2:, 0], x[3:, 1] = torch.nan, torch.inf
    found = lstm(x, lengths=[2, 3])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("lengths", "error", "says"),
    [
        ([5, 6], ValueError, "lengths must lie between 1 and 5 .*got 6"),
        ([0, 5], ValueError, "lengths must lie between 1 and 5 .*got 0"),
        ([5], ValueError, "one element for each of 2 sequences"),
        ([5.0, 2.0], TypeError, "lengths must be whole numbers, got torch.float32"),
        ([True, True], TypeError, "lengths must be whole numbers, got torch.bool"),
        ([5, None], TypeError, r"lengths must be whole numbers, got \[5, None\]"),
        ("52", TypeError, "lengths must be whole numbers, got '52'"),
    ],
    ids=str,
)
def test_wrong_lengths(lengths, error, says):
    lstm = fastlstm.LSTM(3, 4)
    with pytest.raises(error, match=says):
        lstm(torch.randn(5, 2, 3), lengths=lengths)


def test_a_list_of_wrong_lengths_is_refused_by_tracers_too():
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)

    def run(x):
        return lstm(x, lengths=[9, 0])[0].sum()

    torch._dynamo.reset()
    for traced in (torch.compile(run, backend="eager"), torch.func.grad(run)):
        with pytest.raises(ValueError, match="lengths must lie between 1 and 5"):
            traced(x)


def test_lengths_are_read_whatever_the_default_device():
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = lstm(x, lengths=[5, 2])
    with torch.device("meta"):
        found = lstm(x, lengths=[5, 2])
        frozen = fastlstm.prepack(lstm)
        packed = frozen(x, lengths=[5, 2])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(packed, expected)


def test_lengths_where_they_have_no_meaning():
    lstm = fastlstm.LSTM(3, 4)
    with pytest.raises(ValueError, match="lengths need a batch"):
        lstm(torch.randn(5, 3), lengths=[5])
    packed = pack_padded_sequence(torch.randn(5, 2, 3), [5, 2])
    with pytest.raises(ValueError, match="a PackedSequence has its own"):
        lstm(packed, lengths=[5, 2])
    with pytest.raises(ValueError, match="got both"):
        fastlstm.functional.lstm(
            torch.randn(5, 2, 3), None, list(lstm.parameters()),
            lengths=[5, 2], batch_sizes=torch.tensor([2, 1]),
        )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 4\)"):
        lstm(torch.randn(5, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)), lengths=[5, 2])
