"""Checks of what a user passes, in ``nn.LSTM``'s words wherever it has some.

Every check stands here once, for the functions and the modules alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .stack import INDEX_TYPES, Call, Stack

__all__ = [
    "check_call",
    "check_cell_call",
    "check_options",
    "check_probability",
    "check_value",
]


def check_value(name: str, value: Any, valid: Callable[[Any], Any], expected: str) -> None:
    """Raise ValueError where a value is not valid, TypeError where it cannot be compared."""
    try:
        passes = valid(value)
    except TypeError:
        raise TypeError(f"{name} {expected}, got {value!r}") from None
    if not passes:
        raise ValueError(f"{name} {expected}, got {value}")


def check_probability(name: str, value: Any) -> None:
    """Raise ValueError where it lies outside 0 .. 1, TypeError where it is no number."""
    check_value(name, value, lambda p: 0 <= p <= 1, "should be a number in range [0, 1]")


def check_options(stack: Stack, cell_clip: float | None) -> None:
    """Check the options that ``nn.LSTM`` lacks, cell_clip as the user gave it.

    Raises:
        TypeError: no number where one belongs.
        ValueError: a number out of range, or zoneout or layer_norm with a projection.
    """
    for name in ("recurrent_dropout", "zoneout_h", "zoneout_c"):
        check_probability(name, getattr(stack, name))
    check_value(
        "cell_clip", cell_clip, lambda c: c is None or c > 0, "should be a positive number or None"
    )
    if stack.proj_size > 0 and (stack.zoneout_h > 0 or stack.zoneout_c > 0):
        raise ValueError(f"zoneout: expected proj_size=0, got {stack.proj_size}")
    if stack.proj_size > 0 and stack.layer_norm:
        raise ValueError(f"layer_norm: expected proj_size=0, got {stack.proj_size}")


def check_call(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
) -> tuple[Tensor | None, bool]:
    """Check a call of a stack; of several mistakes the one is reported that ``nn.LSTM`` reports.

    Args:
        input: of any form that ``functional.lstm`` takes; all tensors after autocast.

    Returns:
        The lengths as int64 ``(B,)``, None without any or without sequences, and whether they can
        be read; else they are on the weights' device.

    Raises:
        as ``functional.lstm``.
    """
    packed = call.batch_sizes is not None
    index = input.dtype in INDEX_TYPES
    dims = input.dim() + index  # an index counts as the one-hot row that it stands for
    if lengths is not None:
        if dims != 3:
            raise ValueError(
                f"lengths need a batch: expected {3 - index}-D input, got {input.dim()}-D"
            )
        steps, batch = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
        lengths = check_lengths(lengths, steps, batch)
        if batch == 0:  # nothing ends, and nothing can be packed
            lengths = None
    read = lengths is not None and readable(lengths)
    in_rows = packed or read  # lengths that can be read become batch_sizes
    if hx is not None and in_rows:
        check_pair(hx, "lstm")
    if packed and dims != 2:
        raise RuntimeError(f"input must have {2 - index} dimensions, got {input.dim()}")
    if not packed and dims not in (2, 3):
        form = "integer input to be 1D or 2D" if index else "input to be 2D or 3D"
        raise ValueError(f"LSTM: Expected {form}, got {input.dim()}D instead")
    batched = dims == 3 or packed
    if hx is not None:
        check_state_dims(hx, 3 if batched else 2)
    if not index:
        check_input(input, weights[0], stack.input_size, in_rows)
    number: int | None = 1
    if call.batch_sizes is not None:
        number = check_batch_sizes(call.batch_sizes, input.shape[0])
    elif batched:
        number = input.shape[0 if batch_first else 1]
    if hx is not None:
        h0, c0 = (hx[0], hx[1]) if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        check_state_sizes(h0, c0, stack, h0.shape[1] if number is None else number)
    if hx is not None and batched:  # else nn.LSTM takes the first two of anything
        check_pair(hx, "lstm")
    states = () if hx is None else (hx[0], hx[1])
    check_devices(input, states, weights)
    if not packed and input.shape[1 if batch_first and batched else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    check_state_dtypes(states, weights[0])
    check_weights(weights, stack)
    if not 0 <= call.dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] "
            "representing the probability of an element being zeroed"
        )
    if index:
        check_indices(input, stack.input_size)
    if lengths is not None and not read:
        lengths = lengths.to(input.device)
    return lengths, read


def check_cell_call(
    input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor], stack: Stack
) -> None:
    """The same for a call of ``lstm_cell``, in ``nn.LSTMCell``'s words and order.

    Raises:
        as ``functional.lstm_cell``.
    """
    index = input.dtype in INDEX_TYPES
    batched = input.dim() + index == 2
    rows = input if batched else input.unsqueeze(0)
    states = () if hx is None else (hx[0], hx[1])
    if not index and rows.shape[1] != stack.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {rows.shape[1]} expected {stack.input_size}"
        )
    for i, x in enumerate(states):
        state = x if batched else x.unsqueeze(0)
        count, width = state.shape[0], state.shape[1] if state.dim() > 1 else 0
        if count != rows.shape[0]:
            raise RuntimeError(
                f"Input batch size {rows.shape[0]} doesn't match hidden{i} batch size {count}"
            )
        if width != stack.hidden_size:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {width}, expected {stack.hidden_size}"
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
    check_weights(weights, stack, of_cell=True)
    if index:
        check_indices(input, stack.input_size)


def check_pair(hx: Sequence[Tensor], name: str) -> None:
    """Raise TypeError where hx is no tuple or list, RuntimeError where it has not two elements."""
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{name}: hx must be a tuple of two tensors, got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{name} expects two hidden states")


def check_state_dims(hx: Sequence[Tensor], dims: int) -> None:
    """Raise RuntimeError where a state has not so many dimensions."""
    h0, c0 = hx[0], hx[1]
    if h0.dim() != dims or c0.dim() != dims:
        form = "batched 3-D" if dims == 3 else "unbatched 2-D"
        raise RuntimeError(
            f"For {form} input, hx and cx should "
            f"also be {dims}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
        )


def check_input(input: Tensor, like: Tensor, input_size: int, packed: bool) -> None:
    """Raise where input's dtype (ValueError; packed: RuntimeError) or width (RuntimeError) is
    not the weights'."""
    if input.dtype != like.dtype:
        # nn.LSTM finds a packed input's dtype wrong only inside its kernels.
        raise (RuntimeError if packed else ValueError)(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({like.dtype}). "
            f"Convert input: input.to({like.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.shape[-1] != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.shape[-1]}"
        )


def check_state_sizes(h0: Tensor, c0: Tensor, stack: Stack, batch: int) -> None:
    """Raise RuntimeError where a state of ``(L*D, B, width)`` is of another shape."""
    for i, (state, width) in enumerate(((h0, stack.out_size), (c0, stack.hidden_size))):
        expected = (stack.pseudo_layers, batch, width)
        if state.shape != expected:
            raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(state.shape)}")


def check_devices(input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a state or a weight is on another device than input."""
    device = input.device
    for kind, tensors in (("hidden", states), ("parameter", weights)):
        for x in tensors:
            if x.device != device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{device} and {kind} tensor at {x.device}"
                )


def check_state_dtypes(states: Sequence[Tensor], like: Tensor) -> None:
    """Raise RuntimeError where a state's dtype is not the weights'."""
    for i, state in enumerate(states):
        if state.dtype != like.dtype:
            raise RuntimeError(
                f"Input and hidden tensors are not the same dtype: expected hidden[{i}] "
                f"of {like.dtype}, got {state.dtype}"
            )


def check_weights(weights: Sequence[Tensor], stack: Stack, *, of_cell: bool = False) -> None:
    """Raise RuntimeError where a weight is of another shape or dtype.

    Args:
        of_cell: whether they are an ``LSTMCell``'s, whose names lack the layer's number.
    """

    def name(position: int) -> str:
        of_stack = stack.weight_name(position)
        return of_stack.removesuffix("_l0") if of_cell else of_stack

    dtype, expected = weights[0].dtype, stack.weight_shapes()
    if [w.dtype for w in weights] != [dtype] * len(weights):
        dtypes = {name(i): w.dtype for i, w in enumerate(weights)}
        raise RuntimeError(f"parameters must have one dtype, got {dtypes}")
    if [w.shape for w in weights] != expected:
        i = next(i for i, w in enumerate(weights) if w.shape != expected[i])
        raise RuntimeError(
            f"{name(i)} must have shape {expected[i]}, got {tuple(weights[i].shape)}"
        )


def readable(x: Tensor) -> bool:
    """Whether the host can read x's values: not a tracer's, and not without a synchronisation."""
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> int | None:
    """Check what can be checked, and return the number of sequences where it can be read."""
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64:
        raise RuntimeError(
            "batch_sizes must be an int64 tensor on the CPU, "
            f"got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.dim() != 1:
        raise RuntimeError(f"batch_sizes must be 1-D, got {batch_sizes.dim()}-D")
    if batch_sizes.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if not readable(batch_sizes):
        return None
    values = batch_sizes.tolist()
    if values[-1] <= 0 or any(a < b for a, b in pairwise(values)):
        raise RuntimeError("batch_sizes must be positive and must not increase")
    if sum(values) != rows:
        raise RuntimeError(f"batch_sizes add up to {sum(values)}, but input has {rows} rows")
    return values[0]


def check_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """The lengths as int64 ``(B,)``, on the device where they are.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: there are not B of them, or one that can be read lies outside 1 .. T.
    """
    given = None if isinstance(lengths, Tensor) else lengths
    try:
        lengths = torch.as_tensor(lengths, device=None if given is None else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be whole numbers, got {lengths!r} ({error})") from error
    if lengths.numel() == 0:  # of an empty list, too
        lengths = lengths.to(torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be whole numbers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must have one element for each of {batch} sequences, "
            f"got shape {tuple(lengths.shape)}"
        )
    lengths = lengths.to(torch.int64)
    if batch == 0:
        return lengths
    if isinstance(given, (list, tuple)) and all(type(x) is int for x in given):
        low, high = min(given), max(given)  # known to tracers, too
    elif readable(lengths):
        low, high = (int(x) for x in torch.aminmax(lengths))
    else:
        return lengths
    if low < 1 or high > steps:
        raise ValueError(
            f"lengths must lie between 1 and {steps} (input's steps), got "
            f"{low if low < 1 else high}"
        )
    return lengths


def check_indices(input: Tensor, input_size: int) -> None:
    """Raise IndexError where an index that can be read lies outside 0 .. I-1."""
    if not readable(input) or input.numel() == 0:
        return
    if input.numel() == 1:  # one character at a time: item() is cheapest
        low = high = input.item()
    else:
        low, high = (x.item() for x in torch.aminmax(input))
    if low < 0 or high >= input_size:
        value = low if low < 0 else high
        raise IndexError(
            f"input holds the index {value}, expected 0 to {input_size - 1} "
            f"(input_size is {input_size})"
        )
