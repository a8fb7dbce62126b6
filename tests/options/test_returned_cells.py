"""``return_cells=True``: the cell states of every step, with their gradient."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make
from fastlstm import ops, reference

NAMES = ["plain", "zero states", "both directions", "three layers", "projection", "dropout",
         "index", "packed, both directions"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cells_and_their_gradient_match_the_reference(name, dtype, instruction_set):
    def run(lstm, x):
        results = lstm(*x.arguments)
        generator = torch.Generator().manual_seed(1)
        weighted = [y * torch.randn(y.shape, generator=generator).to(y) for y in results]
        return results, torch.autograd.grad(sum(y.sum() for y in weighted), x.leaves())

    x = make(Problem(dtype=dtype, cells=True, **OPTIONS[name]))
    found, expected = run(ops.lstm, x), run(reference.lstm, x.to(torch.float64))
    for ours, theirs in zip(found, expected, strict=True):
        floor = 1e-2 * max(b.norm() for b in theirs)
        for a, b in zip(ours, theirs, strict=True):
            error = (a.double() - b).norm() / torch.maximum(b.norm(), floor).clamp_min(1e-6)
            assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("form", ["batched", "batch_first", "unbatched"])
def test_cells_are_the_states_of_every_prefix(form):
    lstm = fastlstm.LSTM(3, 4, 2, batch_first=form == "batch_first")
    x = torch.randn(5, 2, 3)
    given = {"batched": x, "batch_first": x.transpose(0, 1), "unbatched": x[:, 0]}[form]
    output, (_, c_n), cells = lstm(given, return_cells=True)
    assert torch.equal(output, lstm(given)[0])
    if form == "batch_first":
        cells = cells.transpose(1, 2)
    assert cells.shape == ((2, 5, 4) if form == "unbatched" else (2, 5, 2, 4))
    for t in range(5):
        prefix = given[:, : t + 1] if form == "batch_first" else given[: t + 1]
        torch.testing.assert_close(cells[:, t], lstm(prefix)[1][1])
    assert torch.equal(cells[:, -1], c_n)


def test_cells_without_gradients_and_in_half_types():
    lstm = fastlstm.LSTM(3, 4).bfloat16()
    x = torch.randn(5, 2, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        cells = lstm(x, return_cells=True)[2]
    assert cells.dtype == torch.bfloat16
    assert torch.equal(cells, lstm(x, return_cells=True)[2])


def test_second_derivative_through_cells():
    lstm = fastlstm.LSTM(2, 3, 2).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x):
        return lstm(x, return_cells=True)[2]

    assert torch.autograd.gradcheck(run, (x,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x,), fast_mode=True)
    found = torch.func.vmap(run)(torch.stack([x, 2 * x]).detach())
    torch.testing.assert_close(found[1], run(2 * x))


def test_cells_in_one_compiled_graph():
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: lstm(x, return_cells=True)[2], fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    found, expected = compiled(x), lstm(x, return_cells=True)[2]
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(lstm.parameters()))
             for y in (found, expected)]  # fmt: skip
    torch.testing.assert_close(*grads)


def test_cells_of_sequences_of_any_length():
    """Packed or with lengths, read by the host or not: those of every sequence alone, 0 beyond."""
    lstm = fastlstm.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(4, 6, 3), torch.tensor([2, 6, 1, 4])
    expected = torch.zeros(4, 4, 6, 4)
    for b, n in enumerate(lengths.tolist()):
        expected[:, b, :n] = lstm(x[b, :n], return_cells=True)[2]
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    unread = torch.func.vmap(lambda n: lstm(x, lengths=n, return_cells=True)[2])
    found = [
        lstm(x, lengths=lengths, return_cells=True)[2],
        pad_packed_sequence(lstm(packed, return_cells=True)[2], True)[0].movedim(2, 0),
        unread(lengths[None])[0],
    ]
    parameters = list(lstm.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for cells in found:
        torch.testing.assert_close(cells, expected)
        torch.testing.assert_close(torch.autograd.grad(cells.square().sum(), parameters), wanted)


def test_recomputation_returns_no_cells():
    lean = fastlstm.LSTM(3, 4, checkpoint_every=2)
    with pytest.raises(ValueError, match="return_cells: expected checkpoint_every=None"):
        lean(torch.randn(5, 2, 3), return_cells=True)
