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

The same equations stand in ``csrc/cell.h`` for the native kernels, and what :class:`CellRules` adds
to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["INDEX_TYPES", "CellRules", "cell_backward", "cell_forward", "dropout_mask", "lstm"]

INDEX_TYPES = (torch.int32, torch.int64)  # of input that stands for one-hot rows

_U32 = 0xFFFFFFFF


class CellRules(NamedTuple):
    """What cells do beyond ``nn.LSTM``'s; r, z_c and z_h are drawn from the seed at every step::

        c~_t = f * c_{t-1} + i * (r * g),     |c~_t| <= cell_clip
        h~_t = o * tanh(c~_t)
        c_t  = (1 - z_c) * c~_t + z_c * c_{t-1}
        h_t  = (1 - z_h) * h~_t + z_h * h_{t-1}

    r is 0 with probability recurrent_dropout, else 1 / (1 - recurrent_dropout) (Semeniuta, Severyn
    and Barth, 2016, "Recurrent Dropout without Memory Loss"). z_c and z_h are 1 with probability
    zoneout_c and zoneout_h, else 0; without a seed they are those probabilities (Krueger et
    al., 2017, "Zoneout").
    """

    recurrent_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    cell_clip: float = 0.0  # 0: none

    @property
    def drawn(self) -> bool:
        """Whether a seed is needed, in training."""
        return max(self[:3]) > 0


# The streams of dropout_mask.
_OUTPUT, _UPDATE, _ZONE_C, _ZONE_H = range(4)


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


def _mix32(x: Tensor) -> Tensor:
    """The 32-bit mixing function ``lowbias32`` of Chris Wellons' hash prospector, in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _U32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _U32
    return x ^ (x >> 16)


def hashed_rows(
    seed: Tensor, layer: int, direction: int, t: Tensor, b: Tensor, stream: int = _OUTPUT
) -> Tensor:
    """int64 ``(R,)`` below 2^32, the hash of every row: csrc/dropout.h has the same."""
    seed = seed.reshape(()).to(torch.int64)
    key = _mix32((seed & _U32) ^ _mix32((seed >> 32) & _U32))
    key = _mix32(key ^ ((stream << 24) + 2 * layer + direction))
    return _mix32(_mix32(key ^ (t & _U32)) ^ (b & _U32))


def dropout_mask(
    seed: Tensor,
    layer: int,
    direction: int,
    t: Tensor,
    b: Tensor,
    units: int,
    p: float,
    stream: int = _OUTPUT,
) -> Tensor:
    """Which elements survive dropout: a pure function of the seed and of the element's place.

    Args:
        seed: one int64 element.
        layer, direction: whose output is dropped.
        t: ``(R,)`` int64, the time step of each row.
        b: ``(R,)`` int64, the batch index of each row.
        units: width of the output of one direction.
        p: probability of dropping an element.
        stream: what is dropped: layers' outputs, or one of :class:`CellRules`' choices.

    Returns:
        bool ``(R, units)``, True where the element is kept.
    """
    row = hashed_rows(seed, layer, direction, t, b, stream)
    unit = (torch.arange(units, device=row.device) * 0x9E3779B9) & _U32
    return _mix32(row[:, None] ^ unit) >= int(p * 2**32)


def dropped_out(
    y: Tensor, seed: Tensor, layer: int, direction: int, t: Tensor, b: Tensor, p: float
) -> Tensor:
    """A layer's output ``(R, units)`` of one direction, as the next layer reads it."""
    keep = dropout_mask(seed, layer, direction, t, b, y.shape[-1], p)
    return torch.where(keep, y * _scale(p), torch.zeros_like(y))


def _scale(p: float) -> float:
    """What is kept is multiplied by this."""
    return 0.0 if p >= 1 else 1 / (1 - p)


_EPSILON = 1e-5  # kNormEpsilon in csrc/cell.h


class _Norm(NamedTuple):
    """The gains of W_ih x, W_hh h and c, and what is added to c's."""

    ih: Tensor  # (4H)
    hh: Tensor
    c: Tensor  # (H)
    c_bias: Tensor


class _Factors(NamedTuple):
    """One for every row (R, H): of g, and the shares of the new states; None for none."""

    update: Tensor | None = None
    new_c: Tensor | float | None = None
    new_h: Tensor | float | None = None


def _factors(
    rules: CellRules,
    seed: Tensor | None,
    layer: int,
    direction: int,
    t: Tensor,
    b: Tensor,
    like: Tensor,
    units: int,
) -> _Factors:
    def kept(p: float, stream: int) -> Tensor:
        assert seed is not None
        return dropout_mask(seed, layer, direction, t, b, units, p, stream).to(like.dtype)

    def share(p: float, stream: int) -> Tensor | float | None:
        return None if p == 0 else 1 - p if seed is None else kept(p, stream)

    update, p = None, rules.recurrent_dropout
    if p > 0:
        update = kept(p, _UPDATE) * _scale(p)
    return _Factors(update, share(rules.zoneout_c, _ZONE_C), share(rules.zoneout_h, _ZONE_H))


def _zoned(share: Tensor | float | None, rows: slice, fresh: Tensor, before: Tensor) -> Tensor:
    if share is None:
        return fresh
    share = share[rows] if isinstance(share, Tensor) else share
    return share * fresh + (1 - share) * before


def _ruled_cell(
    gates: Tensor,
    c: Tensor,
    h: Tensor,
    clip: float,
    factors: _Factors,
    rows: slice,
    norm: _Norm | None,
) -> tuple[Tensor, Tensor]:
    """The new h and c of one step, whose rows have these factors."""
    a_i, a_f, a_g, a_o = gates.chunk(4, dim=-1)
    update = torch.tanh(a_g)
    if factors.update is not None:
        update = update * factors.update[rows]
    fresh = torch.sigmoid(a_f) * c + torch.sigmoid(a_i) * update
    if clip > 0:
        fresh = fresh.clamp(-clip, clip)
    squashed = fresh
    if norm is not None:
        squashed = F.layer_norm(fresh, fresh.shape[-1:], norm.c, norm.c_bias, _EPSILON)
    new_h = torch.sigmoid(a_o) * torch.tanh(squashed)
    return _zoned(factors.new_h, rows, new_h, h), _zoned(factors.new_c, rows, fresh, c)


def _layer(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    has_bias: bool,
    sizes: Sequence[int],
    reverse: bool,
    clip: float = 0.0,
    factors: _Factors | None = None,
    norm: _Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer over packed rows: x (R, I), h (B, P), c (B, H).

    Returns its output, h and c after the last step, and c after every step.
    """
    w_ih, w_hh = weights[0], weights[1]
    w_hr = weights[-1] if len(weights) % 2 else None

    def normed(product: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            return product
        return F.layer_norm(product, product.shape[-1:], gain, None, _EPSILON)

    bias = weights[2] + weights[3] if has_bias else None
    if x.dtype in INDEX_TYPES:  # an index is a one-hot row: it picks a column
        projected = w_ih.t()[x.long()]
    else:
        projected = x @ w_ih.t()
    projected = normed(projected, norm.ih if norm else None)
    if bias is not None:
        projected = projected + bias
    steps = list(torch.split(projected, list(sizes)))
    first = [0, *accumulate(sizes)]
    outputs: list[Tensor] = [x] * len(steps)
    cells: list[Tensor] = [x] * len(steps)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = sizes[t]
        gates = steps[t] + normed(h[:n] @ w_hh.t(), norm.hh if norm else None)
        if factors is None:
            new_h, new_c, _ = cell_forward(gates, c[:n])
        else:
            rows = slice(first[t], first[t + 1])
            new_h, new_c = _ruled_cell(gates, c[:n], h[:n], clip, factors, rows, norm)
        if w_hr is not None:
            new_h = new_h @ w_hr.t()
        outputs[t], cells[t] = new_h, new_c
        h, c = torch.cat((new_h, h[n:])), torch.cat((new_c, c[n:]))
    return torch.cat(outputs), h, c, torch.cat(cells)


def lstm(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    hidden_size: int,
    num_layers: int = 1,
    has_bias: bool = True,
    proj_size: int = 0,
    bidirectional: bool = False,
    dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    cell_clip: float = 0.0,
    layer_norm: bool = False,
    seed: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """The whole stack, time-major; differentiable any number of times.

    Args:
        input: ``(T, B, I)`` floating, or ``(T, B)`` int64/int32 indices that stand for one-hot
            rows; with ``batch_sizes``, ``(R, I)`` or ``(R,)`` packed as in ``PackedSequence``.
        h0: ``(L*D, B, P)`` or None for zeros, ``P = proj_size or hidden_size``.
        c0: ``(L*D, B, H)`` or None for zeros.
        weights: ``w_ih, w_hh, [b_ih, b_hh], [w_hr]`` for every layer and direction, in the order
            of ``nn.LSTM``'s flat weights, and with layer_norm ``norm_ih`` and ``norm_hh`` (4H),
            ``norm_c`` and ``norm_c_bias`` (H) behind each.
        dropout: the probability of dropping an element between layers.
        seed: one int64 element, from which everything is drawn; None where nothing is.
        recurrent_dropout, zoneout_h, zoneout_c, cell_clip: see :class:`CellRules`.
        layer_norm: normalise the two products of the gates, and c on its way to h (Ba, Kiros and
            Hinton, 2016):

                a   = norm_ih * norm(W_ih x_t) + b_ih + norm_hh * norm(W_hh h_{t-1}) + b_hh
                h_t = o * tanh(norm_c * norm(c_t) + norm_c_bias)

            with norm(v) = (v - mean v) / sqrt(var v + 1e-5), over all four gates or over c.
        batch_sizes: ``(T,)`` int64 on the CPU, or None where all sequences have length T.
        return_cells: whether to return the cell states of every step too.

    Returns:
        ``output`` (``(T, B, D*P)``, packed ``(R, D*P)``), ``h_n`` (like h0), ``c_n`` (like c0),
        and with ``return_cells`` ``(L*D, R, H)``, R = T*B rows where input is not packed.
    """
    directions = 2 if bidirectional else 1
    per_cell = 2 + 2 * has_bias + (proj_size > 0) + 4 * layer_norm
    out_size = proj_size or hidden_size
    if batch_sizes is None:
        steps, batch = input.shape[:2]
        sizes = [batch] * steps
        x = input.flatten(0, 1)
    else:
        sizes = batch_sizes.tolist()
        steps, batch = len(sizes), sizes[0]
        x = input
    like = weights[0]
    if h0 is None:
        h0 = like.new_zeros(num_layers * directions, batch, out_size)
    if c0 is None:
        c0 = like.new_zeros(num_layers * directions, batch, hidden_size)

    rules = CellRules(recurrent_dropout, zoneout_h, zoneout_c, cell_clip)
    t = b = torch.empty(0)
    if dropout > 0 or rules.drawn:
        t = torch.arange(steps).repeat_interleave(torch.tensor(sizes)).to(x.device)
        b = torch.cat([torch.arange(n) for n in sizes]).to(x.device)
    h_n, c_n, cells = [], [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            cell = layer * directions + direction
            own = list(weights[cell * per_cell : (cell + 1) * per_cell])
            norm = _Norm(*own[-4:]) if layer_norm else None
            own = own[:-4] if layer_norm else own
            given = (x, h0[cell], c0[cell], own, has_bias, sizes, direction == 1)
            if any(rules) or layer_norm:
                factors = _factors(rules, seed, layer, direction, t, b, like, hidden_size)
                y, h, c, every = _layer(*given, cell_clip, factors, norm)
            else:
                y, h, c, every = _layer(*given)
            h_n.append(h)
            c_n.append(c)
            cells.append(every)
            if dropout > 0 and layer < num_layers - 1:
                assert seed is not None
                y = dropped_out(y, seed, layer, direction, t, b, dropout)
            outputs.append(y)
        x = torch.cat(outputs, dim=-1)
    output = x if batch_sizes is not None else x.view(steps, batch, -1)
    results = (output, torch.stack(h_n), torch.stack(c_n))
    return (*results, torch.stack(cells)) if return_cells else results
