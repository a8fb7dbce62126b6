"""On a GPU every option beyond nn.LSTM's does what it says; the judge is the CPU's reference."""

import copy

import pytest
import torch
from torch import nn

import fastlstm
from benchmarks.problems import NORMED, OPTIONS, Problem, make, outputs_and_gradients, tolerance
from fastlstm import functional, reference

pytestmark = pytest.mark.usefixtures("exact_products")


def through_the_function(input, state, weights, stack, call):
    """``functional.lstm`` with the reference's arguments and results."""
    options = stack._asdict() | call._asdict()
    del options["input_size"], options["hidden_size"]
    options["cell_clip"] = stack.cell_clip or None
    hx = None if state[0] is None else state
    y, state = functional.lstm(input, hx, weights, training=True, **options)
    return y, *state


DRAWN = {
    name: fields
    for name, fields in (OPTIONS | NORMED).items()
    if Problem(**fields).training and (Problem(**fields).stack.has_rules or "dropout" in fields)
}
DRAWN |= {name: NORMED[name] for name in NORMED if "unit" not in name}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_clipped_and_normalised_is_the_references(name, dtype, device):
    """From one seed the same elements are dropped and kept on every device."""
    p = Problem(dtype=dtype, **DRAWN[name])
    x = make(p)
    exact = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    found = outputs_and_gradients(through_the_function, x.to(torch.device(device)))
    for ours, theirs in zip(found, exact, strict=True):
        floor = 1e-2 * max(b.norm() for b in theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.device.type, a.dtype) == (device, dtype)
            scale = torch.maximum(b.norm(), floor).clamp_min(1e-6)
            assert (a.cpu().double() - b).norm() / scale < tolerance(p)


EVALUATED = {
    "zoneout": {"zoneout_h": 0.4, "zoneout_c": 0.3},
    "recurrent dropout": {"recurrent_dropout": 0.5, "num_layers": 2},
    "cell clip": {"cell_clip": 0.3, "proj_size": 4},
    "layer norm": {"layer_norm": True, "bidirectional": True, "num_layers": 2},
    "weight dropout": {"weight_dropout": 0.5},
    "recomputation": {"checkpoint_every": 2, "num_layers": 2},
    "all": {"zoneout_c": 0.1, "cell_clip": 1.0, "layer_norm": True, "recurrent_dropout": 0.2},
}


@pytest.mark.parametrize("name", EVALUATED)
def test_a_module_moved_to_a_device_evaluates_as_on_the_cpu(name, device, outcome, assert_close):
    there = fastlstm.LSTM(5, 9, **EVALUATED[name], dtype=torch.float64).eval()
    moved = copy.deepcopy(there).to(device)
    assert {p.device.type for p in moved.parameters()} == {device}
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    expected = outcome(there, x)
    found = {key: y.cpu() for key, y in outcome(moved, x.to(device)).items()}
    assert_close(found, expected, 1e-10)


def test_dropout_follows_one_seed(device):
    lstm = fastlstm.LSTM(5, 33, 3, dropout=0.4, device=device)
    x = torch.randn(6, 4, 5, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = lstm(x)[0]
        runs.append([y.detach(), *torch.autograd.grad(y.sum(), list(lstm.parameters()))])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])
    weights = list(lstm.parameters())
    options = {"num_layers": 3, "dropout": 0.4, "training": True}
    seeds = [torch.tensor([n], device=device) for n in (7, 7, 8)]
    a, b, c = (functional.lstm(x, None, weights, seed=seed, **options)[0] for seed in seeds)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_all_recurrent_weights_dropped(device):
    lstm = fastlstm.LSTM(5, 9, weight_dropout=1.0, device=device)
    bare = copy.deepcopy(lstm).eval()
    nn.init.zeros_(bare.weight_hh_l0)
    x = torch.randn(6, 4, 5, device=device)
    torch.testing.assert_close(lstm(x)[0], bare(x)[0])


def test_recomputation_changes_no_gradient(device, outcome, assert_close):
    plain = fastlstm.LSTM(5, 9, 2, dtype=torch.float64, device=device)
    lean = fastlstm.LSTM(5, 9, 2, checkpoint_every=2, dtype=torch.float64, device=device)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(7, 4, 5, dtype=torch.float64, device=device)
    assert_close(outcome(lean, x), outcome(plain, x), 1e-12)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_cell_states_of_every_step(options, device):
    lstm = fastlstm.LSTM(5, 9, **options, dtype=torch.float64, device=device)
    x = torch.randn(6, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    _, _, cells = lstm(x, return_cells=True)
    (grad,) = torch.autograd.grad(cells.square().sum(), x)
    far, x_far = copy.deepcopy(lstm).cpu(), x.detach().cpu().requires_grad_()
    expected = far(x_far, return_cells=True)[2]
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x_far)
    torch.testing.assert_close((cells.cpu(), grad.cpu()), (expected, expected_grad))
    if not options:
        torch.testing.assert_close(cells[:, 2], lstm(x[:3])[1][1])


@pytest.mark.parametrize("where", ["host", "device"])
def test_lengths_on_the_host_and_on_the_device(where, device):
    lstm = fastlstm.LSTM(5, 9, 2, bidirectional=True, batch_first=True, device=device).double()
    x = torch.randn(4, 6, 5, dtype=torch.float64, device=device)
    lengths = torch.tensor([2, 6, 1, 4])
    given = lengths.to(device) if where == "device" else lengths.tolist()
    y, (h_n, c_n) = lstm(x, lengths=given)
    grads = torch.autograd.grad(y.square().sum() + c_n.sum(), list(lstm.parameters()))
    alone = torch.zeros_like(y)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for b, n in enumerate(lengths.tolist()):
        alone[b, :n], state = lstm(x[b, :n])
        torch.testing.assert_close((h_n[:, b], c_n[:, b]), state)
        loss = loss + state[1].sum()
    torch.testing.assert_close(y, alone)
    expected = torch.autograd.grad(alone.square().sum() + loss, list(lstm.parameters()))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"cell_clip": 0.5}], ids=str)
def test_text_is_drawn_on_a_device(options, device):
    lstm = fastlstm.LSTM(11, 16, 2, **options, device=device).double()
    decoder = nn.Linear(16, 11, device=device).double()
    prime = torch.randint(11, (4, 3), device=device)
    tokens, (h_n, c_n) = fastlstm.generate(lstm, decoder, prime, 7, temperature=0)
    assert (tokens.shape, tokens.dtype, tokens.device.type) == ((7, 3), torch.int64, device)
    y, state = lstm(prime)
    with torch.no_grad():
        for step in range(7):
            likeliest = decoder(y[-1]).argmax(-1)
            assert torch.equal(tokens[step], likeliest)
            before = state
            y, state = lstm(likeliest[None], state)
    torch.testing.assert_close((h_n, c_n), before)
    draws = [
        fastlstm.generate(lstm, decoder, prime, 20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])


def test_rules_are_the_options_of_the_module(device):
    """In training, from torch's generator: the shares of what is kept and dropped."""
    lstm = fastlstm.LSTM(1, 400, zoneout_c=0.25, device=device)
    x = torch.zeros(2, 50, 1, device=device)
    cells = lstm(x, return_cells=True)[2][0]
    kept = (cells[1] == cells[0]).double().mean().item()
    assert kept == pytest.approx(0.25, abs=0.02)
    assert lstm.stack.zoneout_c == 0.25
