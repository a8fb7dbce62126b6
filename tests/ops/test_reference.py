"""The oracle itself: against nn.LSTM, and its derivatives against autograd."""

import itertools

import pytest
import torch

from fastlstm import reference
from fastlstm.stack import Stack


@pytest.mark.parametrize(
    ("proj_size", "bidirectional", "bias"),
    list(itertools.product((0, 3), (False, True), (False, True))),
)
def test_reference_is_nn_lstm(proj_size, bidirectional, bias):
    module = torch.nn.LSTM(
        5, 7, 2, bias=bias, proj_size=proj_size, bidirectional=bidirectional, dtype=torch.float64
    )
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    output, (h_n, c_n) = module(x)
    found = reference.lstm(
        x, None, module._flat_weights, Stack(5, 7, 2, bias, proj_size, bidirectional)
    )
    for a, b in zip(found, (output, h_n, c_n), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_cell_derivative_is_autograds():
    gates = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    c_prev = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    h, c, activated = reference.cell_forward(gates, c_prev)
    dh, dc = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.autograd.grad((h, c), (gates, c_prev), (dh, dc))
    found = reference.cell_backward(activated, c_prev, c, dh, dc)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_mask_has_the_right_rate_in_every_place(p):
    seed = torch.tensor([2**40 + 17])
    rows = torch.arange(4000)
    mask = reference.dropout_mask(seed, 0, 0, rows, rows % 7, 64, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * sigma / mask.numel() ** 0.5
    for rates, n in ((mask.mean(0), 4000), (mask.mean(1), 64)):
        assert (rates - (1 - p)).abs().max() < 5 * sigma / n**0.5
    # Neighbours are independent: the correlation of adjacent units and rows is noise.
    centred = (mask - mask.mean()) / sigma
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 5 / mask.numel() ** 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 5 / mask.numel() ** 0.5


def test_dropout_mask_differs_between_seeds_layers_and_directions():
    rows = torch.arange(100)
    masks = [
        reference.dropout_mask(torch.tensor([seed]), layer, direction, rows, rows, 64, 0.5)
        for seed, layer, direction in itertools.product((1, 2, 2**32 + 1), (0, 1), (0, 1))
    ]
    for a, b in itertools.combinations(masks, 2):
        assert 0.45 < (a == b).double().mean() < 0.55
