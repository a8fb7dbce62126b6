"""Training: nn.LSTM's loss curve, dropout where and as often as promised, autocast."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm


def loss_curve(lstm, head, x, y, steps):
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], 5e-3)
    losses = []
    for _ in range(steps):
        logits = head(lstm(x)[0])
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lstm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("index", [False, True], ids=["one-hot", "index"])
def test_fifty_steps_of_training_follow_nn_lstm(index, twins):
    """Learn the next character of a periodic text, in fp32."""
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 12)) - 32
    windows = text[: 16 * 33].view(16, 33).t()
    x, y = windows[:-1], windows[1:]
    rows = F.one_hot(x, 96).float()
    theirs, ours = twins(96, 64, 2)
    heads = nn.Linear(64, 96), nn.Linear(64, 96)
    heads[1].load_state_dict(heads[0].state_dict())
    expected = loss_curve(theirs, heads[0], rows, y, 50)
    losses = loss_curve(ours, heads[1], x if index else rows, y, 50)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < 0.75 * losses[0]


# Dropout -------------------------------------------------------------------------------------


def transparent(units, p, *, layers=2, bidirectional=False):
    """A stack whose later layers map each unit of the layer below to a unit, and 0 to 0.

    Candidate gate: the input itself; input and output gates open, forget gate shut, no recurrence:
    h = tanh(tanh(x)). So a vanished element of the output is one that was dropped.
    """
    lstm = fastlstm.LSTM(units, units, layers, dropout=p, bidirectional=bidirectional)
    with torch.no_grad():
        for name, w in lstm.named_parameters():
            w.zero_()
            if "bias_ih" in name:
                w.view(4, units).copy_(torch.tensor([40.0, -40.0, 0.0, 40.0])[:, None])
            if "weight_ih" in name:
                reverse, eye = name.endswith("reverse"), torch.eye(units)
                inputs = w.view(4, units, -1)[2]
                first = units if reverse and inputs.shape[1] > units else 0
                inputs[:, first : first + units] = eye
    return lstm


def tanh2(x):
    return torch.tanh(torch.tanh(x))


def gone(y):
    return y.abs() < 1e-6  # not 0: a shut forget gate still leaks 4e-18 of the step before


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_rate_asked_for_and_scales_the_rest(p):
    lstm = transparent(64, p)
    x = torch.full((50, 20, 64), 0.5)
    y, (h_n, _) = lstm(x)
    dropped = gone(y)
    n = y.numel()
    assert abs(dropped.float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    kept = tanh2(tanh2(x) / (1 - p))
    torch.testing.assert_close(y[~dropped], kept[~dropped])
    # No axis is favoured, nor does a mask repeat from step to step.
    for axes in ((1, 2), (0, 2), (0, 1)):
        rates = dropped.float().mean(axes)
        bound = 6 * math.sqrt(p * (1 - p) / (n / rates.numel()))
        assert (rates - p).abs().max() < bound
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    # The recurrence of the layer itself saw, and hands over, what was not dropped.
    torch.testing.assert_close(h_n[0], tanh2(x[0]))


def test_dropout_after_every_layer_but_the_last():
    x = torch.full((40, 20, 16), 0.5)
    for layers in (2, 3, 4):
        y, _ = transparent(16, 0.3, layers=layers)(x)
        survive = 0.7 ** (layers - 1)
        bound = 5 * math.sqrt(survive * (1 - survive) / y.numel())
        assert abs((~gone(y)).float().mean() - survive) < bound
    with pytest.warns(UserWarning, match="dropout option"):
        single = transparent(16, 0.3, layers=1)
    assert not gone(single(x)[0]).any()


def test_dropout_of_both_directions_is_independent():
    y, _ = transparent(32, 0.5, bidirectional=True)(torch.full((30, 20, 32), 0.5))
    forward, backward = gone(y).unflatten(2, (2, 32)).unbind(2)
    assert abs(forward.float().mean() - 0.5) < 0.02
    assert abs(backward.float().mean() - 0.5) < 0.02
    assert abs((forward == backward).float().mean() - 0.5) < 0.02


def test_dropout_of_packed_input():
    lstm = transparent(64, 0.3)
    x = pack_padded_sequence(torch.full((40, 3, 64), 0.5), torch.tensor([40, 25, 10]))
    y, _ = lstm(x)
    assert abs(gone(y.data).float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / y.data.numel())


def test_dropout_is_reproduced_by_the_seed():
    lstm, x = fastlstm.LSTM(3, 33, 2, dropout=0.5), torch.randn(7, 5, 3)
    torch.manual_seed(5)
    first, second = lstm(x)[0], lstm(x)[0]
    torch.manual_seed(5)
    assert torch.equal(lstm(x)[0], first)
    assert torch.equal(lstm(x)[0], second)
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(lstm(x)[0], first)


def test_without_dropout_no_random_number_is_drawn():
    state = torch.get_rng_state()
    x = torch.randn(7, 5, 3)
    torch.set_rng_state(state)
    fastlstm.LSTM(3, 4, 2, dropout=0.5).eval()(x)
    made = torch.get_rng_state()
    torch.set_rng_state(state)
    fastlstm.LSTM(3, 4, 2)(x)
    assert torch.equal(torch.get_rng_state(), made)


def test_evaluation_does_not_drop(twins):
    theirs, ours = twins(3, 5, 2, dropout=0.5)
    x = torch.randn(7, 5, 3)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_dropout_of_everything_equals_nn_lstm(twins, outcome, assert_close):
    theirs, ours = twins(3, 5, 3, dropout=1.0, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert_close(outcome(ours, x), outcome(theirs, x), 1e-10)


def test_gradient_passes_through_the_mask_of_the_forward():
    """The directional derivative, with the seed held still."""
    lstm = fastlstm.LSTM(3, 5, 3, dropout=0.4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)

    def f(x):
        torch.manual_seed(2)
        return lstm(x)[0].square().sum()

    step = 1e-6 * torch.randn_like(x)
    (grad,) = torch.autograd.grad(f(x), x)
    with torch.no_grad():
        difference = (f(x + step) - f(x - step)) / 2
    assert (grad * step).sum().item() == pytest.approx(difference.item(), rel=1e-5)


# Autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["dense", "index", "packed"])
def test_autocast_runs_and_answers_in_its_dtype(lower, given, form):
    ours = fastlstm.LSTM(3, 5, 2)
    x = torch.randn(4, 2, 3)
    hx = (torch.ones(2, 2, 5), torch.ones(2, 2, 5, dtype=given))
    input = torch.tensor([[0, 1], [2, 0]]) if form == "index" else x.to(given)
    if form == "packed":
        input = pack_padded_sequence(input, torch.tensor([4, 2]))
    with torch.autocast("cpu", lower):
        y, (h_n, c_n) = ours(input, hx)
    y = y.data if form == "packed" else y
    assert y.dtype == h_n.dtype == c_n.dtype == lower
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_autocast_equals_the_lower_precision(twins):
    theirs, ours = twins(3, 5, 2)
    lowered, x = theirs.to(torch.bfloat16), torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ours(x)
    torch.testing.assert_close((y, state), lowered(x.bfloat16()), rtol=0, atol=1e-2)


def test_autocast_leaves_float64_alone(twins):
    theirs, ours = twins(3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), theirs(x))
        with pytest.raises(ValueError, match=r"float64\) does not match weight dtype .*bfloat16"):
            fastlstm.LSTM(3, 5)(x)


def test_autocast_of_another_device_changes_nothing():
    ours, x = fastlstm.LSTM(3, 5), torch.randn(4, 2, 3)
    with torch.autocast("cpu", enabled=False):
        assert ours(x)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.to("meta")(x.to("meta"))[0].dtype == torch.float32
