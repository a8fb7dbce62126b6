"""Padded sequences whose lengths the host does not read: ``lstm(x, lengths=...)``.

Reading lengths from a device would synchronise with it, and a tracer has none to read. So the
padding is computed too, and a mask keeps it without effect. The mask is one more input feature, 1
at padding and 0 elsewhere. Its weights saturate the gates: forget open, input and output closed. At
padding h is then 0, and c keeps its value: within 6e-8 of it a step where a GPU's kernel takes one
reciprocal for all gates. h_n is gathered from the output at each sequence's last step. For the
reverse direction every sequence is reversed within its length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dropout
from ..stack import Call, Stack, State
from . import dispatch

__all__ = ["run_padded"]

# A pre-activation that saturates every gate and that float16 can hold.
_SATURATED = 1e4
_EXPECTED = "expected lengths on the CPU, outside of torch.func's transforms"
_ALIGNED = 8  # features are padded to a multiple of this, for tensor cores


def run_padded(
    input: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call,
    draws: bool,
    lengths: Tensor,
) -> tuple[Tensor, ...]:
    """As ``dispatch.run_stack``, which it calls for one direction of one layer at a time.

    Args:
        input: ``(T, B, I)`` or indices ``(T, B)``.
        lengths: ``(B,)`` on input's device; values outside 1 .. T count as the nearest of them.

    Returns:
        ``output (T, B, D*P), h_n, c_n``, output 0 at padding; with ``return_cells`` the cell
        states of every step, ``(L*D, T*B, H)``, too.

    Raises:
        NotImplementedError: layer_norm, which would normalise the mask away, or an option that
            draws at every step.
    """
    if stack.needs_seed and draws:
        raise NotImplementedError(f"recurrent_dropout and zoneout in training: {_EXPECTED}")
    if stack.layer_norm:
        raise NotImplementedError(f"layer_norm: {_EXPECTED}")
    seed = dropout.seed_on(weights[0].device, call.seed) if draws else None
    steps, batch = input.shape[:2]
    t = torch.arange(steps, device=lengths.device)[:, None]
    b = torch.arange(batch, device=lengths.device)
    lengths = lengths.clamp(1, steps)
    inside = t < lengths
    reversed_rows = torch.where(inside, lengths - 1 - t, t) * batch + b  # its own inverse
    last = (lengths - 1) * batch + b
    kinds = len(stack.weight_kinds)
    x, h_n, c_n, cells = input, [], [], []
    for layer in range(stack.num_layers):
        outputs = []
        for direction in range(stack.directions):
            j = layer * stack.directions + direction
            w_ih, *rest = weights[j * kinds : (j + 1) * kinds]
            flagged, w_ih = _flagged(x if direction == 0 else _rows(x, reversed_rows), w_ih, inside)
            one = stack._replace(input_size=w_ih.shape[1], num_layers=1, bidirectional=False)
            before = None
            if state is not None:
                before = state[0][j : j + 1], state[1][j : j + 1]
            y, _, c, *every_c = dispatch.run_stack(
                flagged, before, [w_ih, *rest], one, Call(return_cells=call.return_cells)
            )
            for states in every_c:  # (1, T * B, H)
                states = states.view(steps, batch, -1).masked_fill(~inside[:, :, None], 0)
                states = states if direction == 0 else _rows(states, reversed_rows)
                cells.append(states.flatten(0, 1))
            h_n.append(_rows(y, last))
            c_n.append(c[0])
            y = y.masked_fill(~inside[:, :, None], 0)
            y = y if direction == 0 else _rows(y, reversed_rows)
            if seed is not None and layer < stack.num_layers - 1:
                at, of = (i.flatten() for i in torch.broadcast_tensors(t, b))
                rows = y.flatten(0, 1)
                rows = dropout.drop(rows, seed, layer, direction, at, of, call.dropout)
                y = rows.view_as(y)
            outputs.append(y)
        x = torch.cat(outputs, -1)
    results = (x, torch.stack(h_n), torch.stack(c_n))
    return (*results, torch.stack(cells)) if cells else results


def _rows(x: Tensor, place: Tensor) -> Tensor:
    """Elements ``t * B + b`` of ``(T, B, ...)``, in the shape of ``place``."""
    picked = x.flatten(0, 1).index_select(0, place.flatten())
    return picked.view(*place.shape, *x.shape[2:])


def _flagged(x: Tensor, w_ih: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Input and weights with the feature that saturates the gates at padding."""
    hidden_size, width = w_ih.shape[0] // 4, w_ih.shape[1]
    by_gate = [w_ih.new_full((hidden_size, 1), s * _SATURATED) for s in (-1, 1, 0, -1)]
    columns = torch.cat(by_gate)
    if not x.is_floating_point():
        return torch.where(inside, x, width), torch.cat((w_ih, columns), 1)
    added = _ALIGNED - width % _ALIGNED
    outside = ~inside[:, :, None]
    x = F.pad(x.masked_fill(outside, 0), (0, added))
    flag = torch.arange(x.shape[-1], device=x.device) == width
    x = x.masked_fill(outside & flag, 1)
    return x, torch.cat((w_ih, F.pad(columns, (0, added - 1))), 1)
