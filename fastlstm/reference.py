"""The LSTM's equations in plain PyTorch: the oracle of the tests and the path of double backward.

One cell, with the gates stacked in PyTorch's order i, f, g, o along the last dimension
(Hochreiter and Schmidhuber, 1997, with the forget gate of Gers, Schmidhuber and Cummins, 2000;
the projection is that of Sak, Senior and Beaufays, 2014):

    a  = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh                     (4H)
    i  = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
    c_t = f * c_{t-1} + i * g                                      (H)
    h_t = o * tanh(c_t),  with a projection  h_t = W_hr (o * tanh(c_t))

and its derivative, for dh and dc the gradients that arrive at h_t and c_t:

    dc   = dc + dh * o * (1 - tanh(c_t)^2)
    da_i = dc * g * i * (1 - i)            da_f = dc * c_{t-1} * f * (1 - f)
    da_g = dc * i * (1 - g^2)              da_o = dh * tanh(c_t) * o * (1 - o)
    dc_{t-1} = dc * f                      dh_{t-1} = W_hh^T da        dx_t = W_ih^T da
    dW_ih = sum da x_t^T                   dW_hh = sum da h_{t-1}^T    db = sum da

The same equations stand in ``csrc/cell.h`` for the native kernels, and what the options of
:class:`fastlstm.stack.Stack` add to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dropout
from .dropout import dropout_mask
from .stack import INDEX_TYPES, PLAIN, Call, Stack, State

__all__ = ["cell_backward", "cell_forward", "dropout_mask", "lstm"]

_EPSILON = 1e-5  # kNormEpsilon in csrc/cell.h


def cell_forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the cell to pre-activations.

    Args:
        gates: ``(B, 4H)`` pre-activations in the order i, f, g, o.
        c: ``(B, H)`` previous cell state.

    Returns:
        ``(h, c, activated)``: the hidden state before any projection ``(B, H)``, the new cell
        state ``(B, H)`` and the activated gates ``(B, 4H)``.
    """
    a_i, a_f, a_g, a_o = gates.chunk(4, dim=-1)
    i, f, g, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
    c = f * c + i * g
    return o * torch.tanh(c), c, torch.cat((i, f, g, o), dim=-1)


def cell_backward(
    activated: Tensor, c_prev: Tensor, c: Tensor, dh: Tensor, dc: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate the cell by hand.

    Args:
        activated: ``(B, 4H)`` activated gates, as :func:`cell_forward` returns them.
        c_prev: ``(B, H)`` cell state before the step.
        c: ``(B, H)`` cell state after it.
        dh: ``(B, H)`` gradient that arrives at the step's h.
        dc: ``(B, H)`` gradient that arrives at its c.

    Returns:
        ``(dgates, dc_prev)``: gradients of the pre-activations ``(B, 4H)`` and of ``c_prev``.
    """
    i, f, g, o = activated.chunk(4, dim=-1)
    tanh_c = torch.tanh(c)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dh * tanh_c * o * (1 - o)
    return torch.cat((da_i, da_f, da_g, da_o), dim=-1), dc * f


class _Weights(NamedTuple):
    """The weights of one layer's direction; None for what the stack lacks."""

    w_ih: Tensor  # (4H, I)
    w_hh: Tensor  # (4H, P)
    bias: Tensor | None  # (4H)
    w_hr: Tensor | None  # (P, H)
    norm_ih: Tensor | None  # (4H), gains of W_ih x, W_hh h and c, and what is added to c's
    norm_hh: Tensor | None
    norm_c: Tensor | None  # (H)
    norm_c_bias: Tensor | None

    @staticmethod
    def of(stack: Stack, weights: Sequence[Tensor]) -> _Weights:
        named = dict(zip(stack.weight_kinds, weights, strict=True))
        bias = named["bias_ih"] + named["bias_hh"] if stack.bias else None
        norms = (named.get(name) for name in _Weights._fields[4:])
        return _Weights(weights[0], weights[1], bias, named.get("weight_hr"), *norms)


class _Factors(NamedTuple):
    """One for every row (R, H): of g, and the shares of the new states; None for none."""

    update: Tensor | None = None
    new_c: Tensor | float | None = None
    new_h: Tensor | float | None = None


class _Rows(NamedTuple):
    """The rows of a packed batch: how many a step has, and the step and the sequence of each."""

    sizes: list[int]
    t: Tensor
    b: Tensor


def _rows(sizes: list[int], device: torch.device) -> _Rows:
    t = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
    b = torch.cat([torch.arange(n) for n in sizes]).to(device)
    return _Rows(sizes, t, b)


def _factors(
    stack: Stack, seed: Tensor | None, layer: int, direction: int, rows: _Rows, like: Tensor
) -> _Factors:
    def kept(p: float, stream: int) -> Tensor:
        assert seed is not None
        units = stack.hidden_size
        mask = dropout_mask(seed, layer, direction, rows.t, rows.b, units, p, stream)
        return mask.to(like.dtype)

    def share(p: float, stream: int) -> Tensor | float | None:
        return None if p == 0 else 1 - p if seed is None else kept(p, stream)

    update, p = None, stack.recurrent_dropout
    if p > 0:
        update = kept(p, dropout.UPDATE) * dropout.scale(p)
    return _Factors(
        update, share(stack.zoneout_c, dropout.ZONE_C), share(stack.zoneout_h, dropout.ZONE_H)
    )


def _zoned(share: Tensor | float | None, rows: slice, fresh: Tensor, before: Tensor) -> Tensor:
    if share is None:
        return fresh
    share = share[rows] if isinstance(share, Tensor) else share
    return share * fresh + (1 - share) * before


def _normed(x: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Layer normalisation where there is a gain."""
    return x if gain is None else F.layer_norm(x, x.shape[-1:], gain, bias, _EPSILON)


def _step(
    gates: Tensor, state: State, stack: Stack, w: _Weights, factors: _Factors, rows: slice
) -> State:
    """The new h and c of one step, h before any projection; ``factors`` of all steps' rows."""
    h, c = state
    if not (stack.has_rules or stack.layer_norm):
        new_h, new_c, _ = cell_forward(gates, c)
        return new_h, new_c
    a_i, a_f, a_g, a_o = gates.chunk(4, dim=-1)
    update = torch.tanh(a_g)
    if factors.update is not None:
        update = update * factors.update[rows]
    new_c = torch.sigmoid(a_f) * c + torch.sigmoid(a_i) * update
    if stack.cell_clip > 0:
        new_c = new_c.clamp(-stack.cell_clip, stack.cell_clip)
    new_h = torch.sigmoid(a_o) * torch.tanh(_normed(new_c, w.norm_c, w.norm_c_bias))
    return _zoned(factors.new_h, rows, new_h, h), _zoned(factors.new_c, rows, new_c, c)


def _layer(
    x: Tensor,
    state: State,
    w: _Weights,
    stack: Stack,
    sizes: Sequence[int],
    reverse: bool,
    factors: _Factors,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer over packed rows: x (R, I), h (B, P), c (B, H).

    Returns its output, h and c after the last step, and c after every step.
    """
    if x.dtype in INDEX_TYPES:  # an index is a one-hot row: it picks a column
        projected = w.w_ih.t()[x.long()]
    else:
        projected = x @ w.w_ih.t()
    projected = _normed(projected, w.norm_ih)
    if w.bias is not None:
        projected = projected + w.bias
    steps = list(torch.split(projected, list(sizes)))
    first = [0, *accumulate(sizes)]
    outputs: list[Tensor] = [x] * len(steps)
    cells: list[Tensor] = [x] * len(steps)
    h, c = state
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = sizes[t]
        gates = steps[t] + _normed(h[:n] @ w.w_hh.t(), w.norm_hh)
        rows = slice(first[t], first[t + 1])
        new_h, new_c = _step(gates, (h[:n], c[:n]), stack, w, factors, rows)
        if w.w_hr is not None:
            new_h = new_h @ w.w_hr.t()
        outputs[t], cells[t] = new_h, new_c
        h, c = torch.cat((new_h, h[n:])), torch.cat((new_c, c[n:]))
    return torch.cat(outputs), h, c, torch.cat(cells)


def lstm(
    input: Tensor,
    state: tuple[Tensor | None, Tensor | None] | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call = PLAIN,
) -> tuple[Tensor, ...]:
    """The whole stack, time-major; differentiable any number of times.

    Args:
        input: ``(T, B, I)`` floating, or ``(T, B)`` int64/int32 indices that stand for one-hot
            rows; with ``batch_sizes``, ``(R, I)`` or ``(R,)`` packed as in ``PackedSequence``.
        state: ``(h0, c0)`` of shapes ``(L*D, B, P)`` and ``(L*D, B, H)``; None, also for one of
            them, for zeros.
        weights: ``w_ih, w_hh, [b_ih, b_hh], [w_hr]`` for every layer and direction, in the order
            of ``nn.LSTM``'s flat weights, and with layer_norm ``norm_ih`` and ``norm_hh`` (4H),
            ``norm_c`` and ``norm_c_bias`` (H) behind each.
        stack, call: what is computed; see there.

    Returns:
        ``output`` (``(T, B, D*P)``, packed ``(R, D*P)``), ``h_n`` (like h0), ``c_n`` (like c0),
        and with ``return_cells`` ``(L*D, R, H)``, R = T*B rows where input is not packed.
    """
    if call.batch_sizes is None:
        steps, batch = input.shape[:2]
        sizes = [batch] * steps
        x = input.flatten(0, 1)
    else:
        sizes = call.batch_sizes.tolist()
        steps, batch = len(sizes), sizes[0]
        x = input
    like, (h0, c0) = weights[0], state or (None, None)
    if h0 is None:
        h0 = like.new_zeros(stack.pseudo_layers, batch, stack.out_size)
    if c0 is None:
        c0 = like.new_zeros(stack.pseudo_layers, batch, stack.hidden_size)

    rows = _Rows(sizes, torch.empty(0), torch.empty(0))
    if call.dropout > 0 or stack.needs_seed:
        rows = _rows(sizes, x.device)
    kinds = len(stack.weight_kinds)
    h_n, c_n, cells = [], [], []
    for layer in range(stack.num_layers):
        outputs = []
        for direction in range(stack.directions):
            j = layer * stack.directions + direction
            w = _Weights.of(stack, weights[j * kinds : (j + 1) * kinds])
            factors = _factors(stack, call.seed, layer, direction, rows, like)
            y, h, c, every_c = _layer(x, (h0[j], c0[j]), w, stack, sizes, direction == 1, factors)
            h_n.append(h)
            c_n.append(c)
            cells.append(every_c)
            if call.dropout > 0 and layer < stack.num_layers - 1:
                assert call.seed is not None
                y = dropout.drop(y, call.seed, layer, direction, rows.t, rows.b, call.dropout)
            outputs.append(y)
        x = torch.cat(outputs, dim=-1)
    output = x if call.batch_sizes is not None else x.view(steps, batch, -1)
    results = (output, torch.stack(h_n), torch.stack(c_n))
    return (*results, torch.stack(cells)) if call.return_cells else results
