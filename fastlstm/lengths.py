"""Padded sequences of lengths that the host does not know: ``lstm(x, lengths=...)``.

Where reading the lengths would stop a device's queue, or a tracer is looking, padding runs along
with the cells shut. A further input feature, 1 at padding and 0 elsewhere, has weights that open
the forget gate and close the others, so that c stays as it is and h is 0; h_n is picked from the
output. The reverse direction reads every sequence turned round within its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

__all__ = ["shut"]

# Beyond every pre-activation that a gate can tell from infinity, and within float16.
_SHUT = 1e4
_ALIGNED = 8  # features at a time, for tensor cores

Run = Callable[..., tuple[Tensor, ...]]


def shut(
    run: Run,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor,
    *,
    num_layers: int,
    directions: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run a stack by calls ``run(input, h0, c0, weights)`` of one cell, a layer's direction each.

    Args:
        input: ``(T, B, I)`` or indices ``(T, B)``.
        h0, c0: ``(cells, B, ...)``.
        weights: of the whole stack.
        lengths: ``(B,)`` on input's device; values outside 1 .. T count as the nearest of them.
        dropout, seed: between layers.

    Returns:
        ``output (T, B, W), h_n, c_n``, output 0 at padding; where a call returned the cell states
        of every step, those of all cells, ``(L*D, T*B, H)``, too.
    """
    steps, batch = input.shape[:2]
    t = torch.arange(steps, device=input.device)[:, None]
    b = torch.arange(batch, device=input.device)
    lengths = lengths.clamp(1, steps)
    inside = t < lengths
    turned = torch.where(inside, lengths - 1 - t, t) * batch + b  # its own inverse
    last = (lengths - 1) * batch + b
    per_cell = len(weights) // (num_layers * directions)
    x, h_n, c_n, cells = input, [], [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            cell = layer * directions + direction
            w_ih, *rest = weights[cell * per_cell : (cell + 1) * per_cell]
            own = x if direction == 0 else _rows(x, turned)
            given = [None if s is None else s[cell : cell + 1] for s in (h0, c0)]
            own, w_ih = _flagged(own, w_ih, inside)
            y, _, c, *more = run(own, *given, [w_ih, *rest])
            for every in more:  # (1, T * B, H)
                every = every.view(steps, batch, -1).masked_fill(~inside[:, :, None], 0)
                every = every if direction == 0 else _rows(every, turned)
                cells.append(every.flatten(0, 1))
            h_n.append(_rows(y, last))
            c_n.append(c[0])
            y = y.masked_fill(~inside[:, :, None], 0)
            y = y if direction == 0 else _rows(y, turned)
            if dropout > 0 and layer < num_layers - 1:
                assert seed is not None
                at, of = (i.flatten() for i in torch.broadcast_tensors(t, b))
                rows = y.flatten(0, 1)
                y = reference.dropped_out(rows, seed, layer, direction, at, of, dropout).view_as(y)
            outputs.append(y)
        x = torch.cat(outputs, -1)
    results = (x, torch.stack(h_n), torch.stack(c_n))
    return (*results, torch.stack(cells)) if cells else results


def _rows(x: Tensor, place: Tensor) -> Tensor:
    """Elements ``t * B + b`` of ``(T, B, ...)``, in the shape of ``place``."""
    picked = x.flatten(0, 1).index_select(0, place.flatten())
    return picked.view(*place.shape, *x.shape[2:])


def _flagged(x: Tensor, w_ih: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Input and weights with the feature that shuts the cells at padding."""
    hidden_size, width = w_ih.shape[0] // 4, w_ih.shape[1]
    by_gate = [w_ih.new_full((hidden_size, 1), s * _SHUT) for s in (-1, 1, 0, -1)]
    columns = torch.cat(by_gate)
    if not x.is_floating_point():
        return torch.where(inside, x, width), torch.cat((w_ih, columns), 1)
    more = _ALIGNED - width % _ALIGNED
    outside = ~inside[:, :, None]
    x = F.pad(x.masked_fill(outside, 0), (0, more))
    flag = torch.arange(x.shape[-1], device=x.device) == width
    x = x.masked_fill(outside & flag, 1)
    return x, torch.cat((w_ih, F.pad(columns, (0, more - 1))), 1)
