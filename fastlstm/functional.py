"""The LSTM as a function: autocast, checks, and forms of input.

Whatever form an input has, what runs below is time-major ``(T, B, I)`` or packed rows ``(R, I)``.
What a user can get wrong is checked here, by checks.py; the operators below check nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .checks import check_call, check_cell_call, check_options, check_pair
from .ops import device_lengths, dispatch
from .stack import INDEX_TYPES, PLAIN, Call, Stack, State

__all__ = ["lstm", "lstm_cell"]

_AUTOCAST_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # as autocast: float64 stays


def lstm(  # an argument for each option of nn.LSTM's and ours, and for each form of input
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
            begins there. Tensors of lengths on a GPU, in a compiled graph or under torch.func are
            not read: lengths outside count as the nearest of 1 and T.
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
    stack = Stack(
        0, 0, num_layers, bool(bias), proj_size, bool(bidirectional), recurrent_dropout, zoneout_h,
        zoneout_c, cell_clip or 0.0, bool(layer_norm),
    )  # fmt: skip
    expected = stack.pseudo_layers * len(stack.weight_kinds)
    if len(weights) != expected:
        raise RuntimeError(f"expected {expected} weights for these options, got {len(weights)}")
    if weights[0].dim() != 2:
        raise RuntimeError(f"weights[0] (weight_ih_l0) must be 2-D, got {weights[0].dim()}-D")
    gates, input_size = weights[0].shape
    stack = stack._replace(input_size=input_size, hidden_size=gates // 4)
    if proj_size >= stack.hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")
    check_options(stack, cell_clip)
    if lengths is not None and batch_sizes is not None:
        raise ValueError("expected batch_sizes or lengths, got both")
    call = Call(dropout, seed, batch_sizes, return_cells)
    return run(input, hx, weights, stack, call, training, batch_first, lengths)


def run(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call = PLAIN,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
) -> Any:
    """:func:`lstm` of a stack that is described, as a module describes its own.

    Args:
        call: what the user gave: its dropout counts in training alone, its seed may be None.
    """
    input, hx, weights = _autocast(input, hx, weights)
    return run_cast(input, hx, weights, stack, call, training, batch_first, lengths)


def run_cast(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call,
    training: bool,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    run_stack: Callable[..., tuple[Tensor, ...]] = dispatch.run_stack,
) -> Any:
    """:func:`run` after autocast.

    Args:
        run_stack: what runs the stack, called as ``dispatch.run_stack``. Lengths that cannot be
            read need that one.
    """
    reads_lengths = (
        stack.layer_norm or (training and stack.needs_seed) or run_stack is not dispatch.run_stack
    )
    if torch.compiler.is_dynamo_compiling() and reads_lengths and _on_host(lengths):
        # In a graph lengths cannot be read, so the call is made outside of it.
        return torch._dynamo.disable(run_cast)(
            input, hx, weights, stack, call, training, batch_first, lengths, run_stack
        )
    lengths, lengths_are_read = check_call(input, hx, weights, stack, call, batch_first, lengths)

    if call.dropout > 0 and not (training and stack.num_layers > 1):
        call = call._replace(dropout=0.0)
    if stack.recurrent_dropout > 0 and not training:
        stack = stack._replace(recurrent_dropout=0.0)
    draws = call.dropout > 0 or (training and stack.needs_seed)
    # From here on input is time-major, or packed rows.
    form = _Form()
    form.batch_first = batch_first
    if lengths is not None and lengths_are_read:
        form.total_length = input.shape[1 if batch_first else 0]
        form.sorted = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
        input, call = form.sorted.data, call._replace(batch_sizes=form.sorted.batch_sizes)
    elif call.batch_sizes is not None:
        form.packed = True
    elif input.dim() + (input.dtype in INDEX_TYPES) == 2:
        form.batched, input = False, input.unsqueeze(1)
    elif batch_first:
        input = input.transpose(0, 1)
    state = None if hx is None else form.state_in(hx[0], hx[1])
    if lengths is None or lengths_are_read:
        results = run_stack(input, state, weights, stack, call, draws)
    elif run_stack is not dispatch.run_stack:
        raise NotImplementedError(
            "packed weights take lengths that can be read when the call is made: none under a "
            "torch.func transform"
        )
    else:
        results = device_lengths.run_padded(input, state, weights, stack, call, draws, lengths)
    output, h_n, c_n, *cells = results
    # The kernels keep c in float64 or float32.
    cells = [form.cells_out(x.to(output.dtype), output) for x in cells]
    return form.output_out(output), form.state_out(h_n, c_n), *cells


def _on_host(lengths: Tensor | Sequence[int] | None) -> bool:
    """Whether there are lengths that the CPU can read."""
    return lengths.device.type == "cpu" if isinstance(lengths, Tensor) else lengths is not None


class _Form:
    """The form in which a user gave the input, and takes the results.

    Attributes:
        batch_first: whether what is padded has its batch first.
        batched: whether there is a batch at all.
        packed: whether input is the rows of a ``PackedSequence``.
        sorted: what was made of padded input and lengths that can be read.
        total_length: of that padded input.
    """

    batch_first = False
    batched = True
    packed = False
    sorted: PackedSequence | None = None
    total_length = 0

    def state_in(self, h0: Tensor, c0: Tensor) -> State:
        if self.sorted is not None:
            order = cast(Tensor, self.sorted.sorted_indices)
            return h0.index_select(1, order), c0.index_select(1, order)
        return (h0, c0) if self.batched else (h0.unsqueeze(1), c0.unsqueeze(1))

    def state_out(self, h_n: Tensor, c_n: Tensor) -> State:
        if self.sorted is not None:
            order = cast(Tensor, self.sorted.unsorted_indices)
            return h_n.index_select(1, order), c_n.index_select(1, order)
        return (h_n, c_n) if self.batched else (h_n.squeeze(1), c_n.squeeze(1))

    def output_out(self, output: Tensor) -> Tensor:
        if self.sorted is not None:
            return self._padded(output)
        if not self.batched:
            return output.squeeze(1)
        return output.transpose(0, 1) if self.batch_first and not self.packed else output

    def cells_out(self, cells: Tensor, output: Tensor) -> Tensor:
        """Every step's c, from ``(L*D, R, H)`` to the output's form behind L*D."""
        if self.sorted is not None:
            return self._padded(cells.movedim(0, 1)).movedim(2, 0)
        if self.packed:
            return cells
        cells = cells.unflatten(1, output.shape[:2])
        if not self.batched:
            return cells.squeeze(2)
        return cells.transpose(1, 2) if self.batch_first else cells

    def _padded(self, rows: Tensor) -> Tensor:
        _, batch_sizes, _, order = cast(PackedSequence, self.sorted)
        vf: Any = torch._VF
        # pad_packed_sequence computes lengths too, from an order that has no data on "meta".
        padded, _ = vf._pad_packed_sequence(
            rows, batch_sizes, self.batch_first, 0.0, self.total_length
        )
        return padded.index_select(0 if self.batch_first else 1, cast(Tensor, order))


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
    stack = Stack(input_size, gates // 4, bias=b_ih is not None)
    input, hx, weights = _autocast(input, hx, weights)
    check_cell_call(input, hx, weights, stack)

    def of_stack(x: Tensor) -> Tensor:
        """``(1, B, ...)``: one step, or one layer."""
        return x.unsqueeze(0) if batched else x[None, None]

    before = None if hx is None else (of_stack(hx[0]), of_stack(hx[1]))
    _, h, c, *_ = dispatch.run_stack(of_stack(input), before, weights, stack, PLAIN)
    # As nn.LSTMCell's, they are no views: they may be detached in place. A trace fits any batch.
    shape = [-1, stack.hidden_size] if batched else [-1]
    return torch.ops.aten._unsafe_view(h, shape), torch.ops.aten._unsafe_view(c, shape)


def _autocast(
    input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor] | None, Sequence[Tensor]]:
    """The arguments in autocast's dtype, for autocast does not know our operators."""
    if not isinstance(input, Tensor):
        kind = type(input).__name__
        raise AttributeError(f"input should be a Tensor: {kind!r} object has no attribute 'dim'")
    kind = input.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # autocast has no device "meta"
        return input, hx, weights
    return cast_all(input, hx, weights, torch.get_autocast_dtype(kind))


def cast_all(
    input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Sequence[Tensor] | None, Sequence[Tensor]]:
    """The arguments in this dtype, as far as autocast would cast them."""

    def lower(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype in _AUTOCAST_TYPES else x

    if isinstance(hx, (tuple, list)):  # else it is refused, or unbatched: its first two count
        hx = [lower(x) for x in hx]
    elif hx is not None:
        hx = lower(hx) if isinstance(hx, Tensor) else [lower(hx[0]), lower(hx[1])]
    return lower(input), hx, [lower(w) for w in weights]
