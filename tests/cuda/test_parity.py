"""On a GPU the module's numbers are nn.LSTM's, in every option, form of input and dtype.

The judge is nn.LSTM in float64 on the CPU, on the same rounded values.
"""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from benchmarks.problems import TOLERANCE

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
    pytest.mark.usefixtures("exact_products"),
]
DTYPES = list(TOLERANCE)


def moved(x, *to):
    if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence):
        return tuple(moved(y, *to) for y in x)
    return None if x is None else x.to(*to)


def assert_as_close_as_its_type(found, exact, dtype):
    """Relative L2 distances; a small gradient is measured against the largest, as in problems.py"""
    assert found.keys() == exact.keys()
    for kind in ("grad", ""):
        names = [name for name in exact if name.startswith("grad") == bool(kind)]
        floor = 1e-2 * max(exact[name].norm() for name in names)
        for name in names:
            a, b = found[name], exact[name]
            assert (a.shape, a.dtype) == (b.shape, dtype), name
            scale = max(b.norm(), floor).clamp_min(1e-6)
            assert (a.cpu().double() - b).norm() / scale < TOLERANCE[dtype], name


def drawn(draw, dtype):
    """A module of nn's, an input and a state, on the CPU."""
    rng = random.Random(draw)
    hidden = rng.choice([1, 7, 16, 33, 40])
    theirs = nn.LSTM(
        rng.choice([1, 5, 24]),
        hidden,
        rng.choice([1, 2, 3]),
        bias=rng.random() < 0.8,
        batch_first=rng.random() < 0.5,
        bidirectional=rng.random() < 0.5,
        proj_size=rng.choice([0, 0, min(4, hidden - 1)]),
        dtype=dtype,
    )
    steps, batch = rng.choice([1, 4, 9]), rng.choice([1, 3, 17])
    form = rng.choice(["padded", "padded", "unbatched", "packed", "packed unsorted"])
    x = torch.randn(steps, batch, theirs.input_size).to(dtype)
    middle = (batch,)
    if form == "unbatched":
        x, middle = x[:, 0], ()
    elif form == "padded":
        x = x.transpose(0, 1).contiguous() if theirs.batch_first else x
    else:
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[0] = steps
        if form == "packed":
            lengths = lengths.sort(descending=True).values
        x = pack_padded_sequence(x, lengths, enforce_sorted=form == "packed")
    hx = None
    if rng.random() < 0.6:
        cells = theirs.num_layers * (1 + theirs.bidirectional)
        widths = (theirs.proj_size or hidden, hidden)
        hx = tuple(torch.randn(cells, *middle, width).to(dtype) for width in widths)
    return theirs, x, hx


def ours_of(theirs, device):
    """The same module of ours, on the device, in its dtype."""
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    options = {name: getattr(theirs, name) for name in (*names, "bidirectional", "proj_size")}
    ours = fastlstm.LSTM(**options, dtype=theirs.weight_ih_l0.dtype, device=device)
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw", range(12))
def test_a_drawn_module_is_nn_lstm(draw, dtype, device, outcome):
    torch.manual_seed(draw)
    theirs, x, hx = drawn(draw, dtype)
    ours = ours_of(theirs, device)
    found = outcome(ours, moved(x, device), moved(hx, device))
    assert {y.device.type for y in found.values()} == {device}
    wide = torch.float64
    exact = outcome(copy.deepcopy(theirs).double(), moved(x, wide), moved(hx, wide))
    assert_as_close_as_its_type(found, exact, dtype)
    assert type(ours(moved(x, device))[0]) is type(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_indices_are_one_hot_rows(packed, dtype, device, outcome):
    theirs = nn.LSTM(9, 33, 2, bidirectional=True, dtype=dtype)
    ours = ours_of(theirs, device)
    index = torch.randint(9, (6, 5))
    x = F.one_hot(index, 9).to(torch.float64)
    if packed:
        lengths = torch.tensor([3, 6, 1, 2, 6])
        index, x = (pack_padded_sequence(a, lengths, enforce_sorted=False) for a in (index, x))
    exact = outcome(copy.deepcopy(theirs).double(), x)
    del exact["grad input"]
    for kind in (torch.int64, torch.int32):
        found = outcome(ours, index.to(device).to(kind))
        assert_as_close_as_its_type(found, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_is_nn_lstm_cell(dtype, device):
    theirs = nn.LSTMCell(5, 33, dtype=dtype)
    ours = fastlstm.LSTMCell(5, 33, dtype=dtype, device=device)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(7, 5).to(dtype), tuple(torch.randn(7, 33).to(dtype) for _ in range(2))

    def results(cell, x, hx):
        h, c = cell(x, hx)
        grads = torch.autograd.grad(h.double().square().sum() + c.sum(), list(cell.parameters()))
        names = ("h", "c", *(f"grad {name}" for name, _ in cell.named_parameters()))
        return dict(zip(names, (h.detach(), c.detach(), *grads), strict=True))

    exact = results(theirs.double(), x.double(), moved(hx, torch.float64))
    assert_as_close_as_its_type(results(ours, moved(x, device), moved(hx, device)), exact, dtype)


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch(batch_first, device, outcome):
    ours = fastlstm.LSTM(3, 5, 2, batch_first=batch_first, device=device)
    x = torch.randn((0, 4, 3) if batch_first else (4, 0, 3), device=device)
    found = outcome(ours, x)
    assert found["output"].shape == ((0, 4, 5) if batch_first else (4, 0, 5))
    assert not found["grad weight_hh_l1"].any()


def test_70_000_steps(device):
    """Beyond the 65,535 at which some libraries end."""
    ours = fastlstm.LSTM(1, 2, device=device, dtype=torch.float64)
    x = torch.randn(70_000, 1, 1, device=device, dtype=torch.float64, requires_grad=True)
    y, (h_n, _) = ours(x)
    (grad,) = torch.autograd.grad(y[-1].sum(), x)
    assert torch.equal(y[-1], h_n[0])
    with torch.no_grad():
        middle = ours(x[:35_000])[1]
    rest = ours(x[35_000:], middle)[0]
    torch.testing.assert_close(rest, y[35_000:], rtol=0, atol=1e-12)
    assert grad[-1].abs().item() > 0
    (again,) = torch.autograd.grad(rest[-1].sum(), x)
    torch.testing.assert_close(grad[35_000:], again[35_000:], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast_with_a_gradient_scaler(dtype, device):
    """Half types inside, float32 weights and gradients; a step of infinite gradients is skipped."""
    ours, head = fastlstm.LSTM(4, 24, 2, device=device), nn.Linear(24, 1, device=device)
    parameters = [*ours.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    x = torch.randn(9, 16, 4, device=device)
    target = x.cumsum(0)[..., :1].tanh()
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            y, state = ours(x)
            assert {t.dtype for t in (y, *state)} == {dtype}
            loss = F.mse_loss(head(y).float(), target)
        before = ours.weight_hh_l1.detach().clone()
        scaler.scale(loss).backward()
        if step == 3:
            ours.weight_hh_l1.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, ours.weight_hh_l1) == (step == 3)
        losses.append(loss.item())
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    assert losses[-1] < 0.5 * losses[0]
    assert scaler.get_scale() < 1024
