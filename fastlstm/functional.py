"""The LSTM as a function: forms of input, autocast, and what is drawn.

What a user can get wrong is checked here, by checks.py; backends.py and the operators below check
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import backends
from .checks import (
    Sizes,
    check_batch_sizes,
    check_devices,
    check_indices,
    check_input,
    check_lengths,
    check_pair,
    check_rules,
    check_state_dims,
    check_state_dtypes,
    check_state_sizes,
    check_weights,
    readable,
)
from .reference import INDEX_TYPES, CellRules

__all__ = ["lstm", "lstm_cell"]

State = tuple[Tensor, Tensor]

_AUTOCAST_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # as autocast: float64 stays


def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    bidirectional: bool = False,
    proj_size: int = 0,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    seed: Tensor | None = None,
    return_cells: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    cell_clip: float | None = None,
    layer_norm: bool = False,
) -> Any:
    """Run a whole LSTM stack in one call. The hidden size ``H`` is inferred from the weights.

    With T steps, batch size B, input size I, L layers, D directions and ``P = proj_size or H``:

    Args:
        input: floating ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``, or ``(T, I)`` without
            a batch; or int64/int32 indices ``(T, B)``, ``(B, T)`` or ``(T,)``, which stand for
            one-hot rows of width I; with ``batch_sizes``, packed ``(R, I)`` or ``(R,)``.
            float32, float64, bfloat16 and float16 run on the fused kernels.
        hx: ``(h_0, c_0)`` of shapes ``(L*D, B, P)`` and ``(L*D, B, H)``, without the batch
            dimension where input has none, or None for zeros.
        weights: ``w_ih, w_hh, [b_ih, b_hh], [w_hr]`` of every layer and direction, in the order
            of ``nn.LSTM``'s parameters, of one dtype and device with a floating input; with
            layer_norm ``norm_ih, norm_hh, norm_c, norm_c_bias`` behind each.
        num_layers, bias, batch_first, bidirectional, proj_size: as of ``nn.LSTM``.
        dropout: the probability of dropping an element of a layer's output on its way to the next
            layer; only with ``training``.
        training: whether elements are dropped, as ``nn.Module.training`` says it.
        batch_sizes: int64 ``(T,)`` on the CPU, the number of sequences that reach each step, as
            in a ``PackedSequence``. hx is in the order of the packed sequences.
        lengths: instead of ``batch_sizes``, ``(B,)`` whole numbers from 1 to T in any order, for
            padded input: what lies beyond a sequence's length is neither read nor written (output
            is zero there), states are those after its own last step, and the reverse direction
            begins there. Lengths on a GPU are not read by the host: those outside count as the
            nearest of 1 and T.
        seed: one int64 element on input's device that decides what is dropped. By default it is
            drawn from the device's default generator (``torch.manual_seed`` reproduces it).
        return_cells: whether to return the cell states of every layer, direction and step too.
        recurrent_dropout: the probability of dropping an element of the candidate g in a step;
            only with ``training`` (Semeniuta, Severyn and Barth, 2016).
        zoneout_h, zoneout_c: the probability that an element of h or c keeps its value in a step;
            without ``training`` that share of the old value is kept (Krueger et al., 2017). For
            stacks without a projection.
        cell_clip: a bound on the magnitude of every new c, before its tanh; None for none.
        layer_norm: whether the gates' two products, and c on its way to h, are normalised
            (Ba, Kiros and Hinton, 2016). For stacks without a projection.

    Under autocast float32, bfloat16 and float16 tensors are cast to the autocast dtype, and
    output and states have it.

    Returns:
        ``output, (h_n, c_n)``: output ``(T, B, D*P)``, ``(B, T, D*P)``, ``(T, D*P)`` or packed
        ``(R, D*P)``; h_n and c_n shaped like h_0 and c_0. With ``return_cells`` a third result,
        ``(L*D, T, B, H)``, ``(L*D, B, T, H)`` with ``batch_first``, ``(L*D, T, H)`` or packed
        ``(L*D, R, H)``, which has a gradient as the others have; 0 beyond ``lengths``.

    Raises:
        ValueError: wrong number of input dimensions, input dtype, options or lengths out of range,
            both batch_sizes and lengths.
        RuntimeError: wrong shapes, states or weights of another dtype or device, an empty
            sequence (T = 0), invalid ``batch_sizes``.
        IndexError: an index outside ``0 .. I-1`` (on the CPU, in eager mode).
        TypeError: hx of batched input is no tuple or list; lengths are no whole numbers.
        NotImplementedError: an option that ``nn.LSTM`` lacks where there are no kernels, or beside
            lengths on a GPU.
    """
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    per_cell = 2 + 2 * bool(bias) + (proj_size > 0) + 4 * bool(layer_norm)
    expected = num_layers * (1 + bool(bidirectional)) * per_cell
    if len(weights) != expected:
        raise RuntimeError(f"expected {expected} weights for these options, got {len(weights)}")
    if weights[0].dim() != 2:
        raise RuntimeError(f"weights[0] (weight_ih_l0) must be 2-D, got {weights[0].dim()}-D")
    gates, input_size = weights[0].shape
    sizes = Sizes(
        input_size, gates // 4, num_layers, bool(bias), bool(bidirectional), proj_size,
        bool(layer_norm),
    )  # fmt: skip
    if proj_size >= sizes.hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")
    rules = check_rules(recurrent_dropout, zoneout_h, zoneout_c, cell_clip, proj_size, layer_norm)
    if lengths is None:
        return lstm_of_sizes(
            input, hx, weights, sizes, batch_first, dropout, training, batch_sizes, seed,
            return_cells, rules,
        )  # fmt: skip
    if batch_sizes is not None:
        raise ValueError("expected batch_sizes or lengths, got both")
    return lstm_of_lengths(
        input, hx, weights, sizes, lengths, batch_first, dropout, training, seed, return_cells,
        rules,
    )  # fmt: skip


def lstm_of_sizes(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    sizes: Sizes,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    seed: Tensor | None = None,
    return_cells: bool = False,
    rules: CellRules | None = None,
    unread_lengths: Tensor | None = None,
) -> Any:
    """:func:`lstm` for sizes that are known, as a module knows its own."""
    packed = batch_sizes is not None
    index = input.dtype in INDEX_TYPES
    dims = input.dim() + index  # as if an index were the row that it stands for
    if packed and hx is not None:
        check_pair(hx, "lstm")
    if packed and dims != 2:
        raise RuntimeError(f"input must have {2 - index} dimensions, got {input.dim()}")
    if not packed and dims not in (2, 3):
        form = "integer input to be 1D or 2D" if index else "input to be 2D or 3D"
        raise ValueError(f"LSTM: Expected {form}, got {input.dim()}D instead")
    batched = dims == 3 or packed
    if hx is not None:
        check_state_dims(hx, 3 if batched else 2)

    input, states, weights = _autocast(input, hx, weights)
    if not index:
        check_input(input, weights[0], sizes.input_size, packed)
    batch: int | None
    if packed:
        batch = check_batch_sizes(cast(Tensor, batch_sizes), input.shape[0])
    else:
        if not batched:
            input = input.unsqueeze(1)
        elif batch_first:
            input = input.transpose(0, 1)
        batch = input.shape[1]
    # The order of what follows is nn.LSTM's, for calls that make several mistakes.
    h0 = c0 = None
    if states:
        h0, c0 = states if batched else (x.unsqueeze(1) for x in states)
        check_state_sizes(h0, c0, sizes, h0.shape[1] if batch is None else batch)
    if hx is not None and batched:  # else nn.LSTM takes the first two of anything
        check_pair(hx, "lstm")
    check_devices(input, states, weights)
    if not packed and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    check_state_dtypes(states, weights[0])
    check_weights(weights, sizes)
    if not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] "
            "representing the probability of an element being zeroed"
        )
    if index:
        check_indices(input, sizes.input_size)

    drop = dropout if training and sizes.num_layers > 1 else 0.0
    if rules is not None and not training:
        rules = rules._replace(recurrent_dropout=0.0)
    draws = drop > 0 or (training and rules is not None and rules.drawn)
    if unread_lengths is not None:
        output, h_n, c_n, *more = backends.run_shut(
            input, h0, c0, weights, sizes, drop, seed, draws, unread_lengths, return_cells, rules
        )
    else:
        output, h_n, c_n, *more = backends.run(
            input, h0, c0, weights, sizes, drop, batch_sizes, seed, draws, return_cells, rules
        )
    # (L*D, R, H), in the type that the kernels keep them in
    more = [x.to(output.dtype) for x in more]
    if not packed:
        more = [x.unflatten(1, (-1, input.shape[1])) for x in more]
    if not batched:
        output, h_n, c_n = output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
        more = [x.squeeze(2) for x in more]
    elif batch_first and not packed:
        output, more = output.transpose(0, 1), [x.transpose(1, 2) for x in more]
    return output, (h_n, c_n), *more


def lstm_of_lengths(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    sizes: Sizes,
    lengths: Tensor | Sequence[int],
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    return_cells: bool = False,
    rules: CellRules | None = None,
) -> Any:
    """:func:`lstm` for padded input of given lengths: packed, run, and padded again."""
    index = input.dtype in INDEX_TYPES
    if input.dim() + index != 3:
        raise ValueError(f"lengths need a batch: expected {3 - index}-D input, got {input.dim()}-D")
    steps, batch = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    lengths = check_lengths(lengths, steps, batch)
    if not readable(lengths):
        return lstm_of_sizes(
            input, hx, weights, sizes, batch_first, dropout, training, seed=seed,
            return_cells=return_cells, rules=rules, unread_lengths=lengths.to(input.device),
        )  # fmt: skip
    # What the state's batch must be is checked before it is sorted.
    if hx is not None:
        check_pair(hx, "lstm")
        check_state_dims(hx, 3)
        check_state_sizes(hx[0], hx[1], sizes, batch)
    packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
    order, back = cast(Tensor, packed.sorted_indices), cast(Tensor, packed.unsorted_indices)
    if hx is not None:
        hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
    output, (h_n, c_n), *more = lstm_of_sizes(
        packed.data, hx, weights, sizes, False, dropout, training, packed.batch_sizes, seed,
        return_cells, rules,
    )  # fmt: skip

    def pad(rows: Tensor) -> Tensor:
        again = PackedSequence(rows, packed.batch_sizes, order, back)
        return pad_packed_sequence(again, batch_first, total_length=steps)[0]

    state = h_n.index_select(1, back), c_n.index_select(1, back)
    return pad(output), state, *(pad(x.movedim(0, 1)).movedim(2, 0) for x in more)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    """One step of one cell, as ``nn.LSTMCell`` computes it.

    Args:
        input: floating ``(B, I)`` or ``(I,)``, or int64/int32 indices ``(B,)`` or ``()`` that
            stand for one-hot rows of width I.
        hx: ``(h, c)``, each ``(B, H)``, or ``(H,)`` where input has no batch; None for zeros.
        w_ih: ``(4H, I)``.
        w_hh: ``(4H, H)``.
        b_ih, b_hh: ``(4H,)``, both or none.

    Returns:
        The new ``(h, c)``, shaped like hx.

    Raises:
        ValueError: wrong number of dimensions.
        RuntimeError: wrong sizes, dtypes or devices.
        IndexError: an index outside ``0 .. I-1`` (on the CPU, in eager mode).
        TypeError: hx of batched input is no tuple or list.
    """
    index = input.dtype in INDEX_TYPES
    if input.dim() + index not in (1, 2):
        form = "integer input to be 0D or 1D" if index else "input to be 1D or 2D"
        raise ValueError(f"LSTMCell: Expected {form}, got {input.dim()}D instead")
    if hx is not None:
        for i, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(
                    f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {state.dim()}D instead"
                )
        if input.dim() + index == 2:  # else nn.LSTMCell takes the first two of anything
            check_pair(hx, "lstm_cell")
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("expected both b_ih and b_hh, or neither")
    batched = input.dim() + index == 2
    weights: Sequence[Tensor] = (w_ih, w_hh)
    if b_ih is not None and b_hh is not None:
        weights = (w_ih, w_hh, b_ih, b_hh)
    if w_ih.dim() != 2:
        raise RuntimeError(f"weight_ih must be 2-D, got {w_ih.dim()}-D")
    gates, input_size = w_ih.shape
    sizes = Sizes(input_size, gates // 4, bias=b_ih is not None)

    input, states, weights = _autocast(input, hx, weights)
    if not batched:
        input, *states = (x.unsqueeze(0) for x in (input, *states))
    if not index and input.shape[1] != input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[1]} expected {input_size}"
        )
    for i, state in enumerate(states):
        count, width = state.shape[0], state.shape[1] if state.dim() > 1 else 0
        if count != input.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{i} batch size {count}"
            )
        if width != sizes.hidden_size:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {width}, expected {sizes.hidden_size}"
            )
        if state.dim() != 2:
            raise RuntimeError(f"hx[{i}] must have as many dimensions as input")
    check_devices(input, states, weights)
    if not index and input.dtype != weights[0].dtype:
        raise RuntimeError(
            f"input and weights must have the same dtype, "
            f"but got {input.dtype} and {weights[0].dtype}"
        )
    check_state_dtypes(states, weights[0])
    check_weights(weights, sizes, of_cell=True)
    if index:
        check_indices(input, input_size)

    h0, c0 = (x.unsqueeze(0) for x in states) if states else (None, None)
    _, h, c, *_ = backends.run(input.unsqueeze(0), h0, c0, weights, sizes)
    return (h[0], c[0]) if batched else (h[0, 0], c[0, 0])


def _autocast(
    input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """What autocast would do to an operator that it knows: input, the states, if any, weights."""
    kind, states = input.device.type, () if hx is None else (hx[0], hx[1])
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # autocast has no device "meta"
        return input, states, weights
    dtype = torch.get_autocast_dtype(kind)

    def lower(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype in _AUTOCAST_TYPES else x

    return lower(input), [lower(x) for x in states], [lower(w) for w in weights]
