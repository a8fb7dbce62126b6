"""What a user can get wrong, said in ``nn.LSTM``'s words wherever it has some.

Every check stands here once, for the functions and the modules alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import CellRules

# Parameters of a layer-normalised cell, behind the others.
NORMS = ["norm_ih", "norm_hh", "norm_c", "norm_c_bias"]


class Sizes(NamedTuple):
    """The stack's sizes and options, which decide the shapes of its weights and states."""

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj_size: int = 0
    layer_norm: bool = False

    @property
    def out_size(self) -> int:
        """P: elements of h."""
        return self.proj_size or self.hidden_size

    @property
    def cells(self) -> int:
        """L*D: layers times directions."""
        return self.num_layers * (1 + self.bidirectional)

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Of all weights, in the order of ``nn.LSTM``'s parameters."""
        gates, out, directions = 4 * self.hidden_size, self.out_size, 1 + self.bidirectional
        rest: list[tuple[int, ...]] = [(gates, out)]
        if self.bias:
            rest += [(gates,), (gates,)]
        if self.proj_size > 0:
            rest += [(out, self.hidden_size)]
        if self.layer_norm:
            rest += [(gates,), (gates,), (self.hidden_size,), (self.hidden_size,)]
        first = [(gates, self.input_size), *rest] * directions
        deeper = [(gates, directions * out), *rest] * directions
        return first + deeper * (self.num_layers - 1)

    def weight_name(self, position: int) -> str:
        """Of the weight at that place in the same order."""
        kinds = ["weight_ih", "weight_hh"]
        kinds += ["bias_ih", "bias_hh"] if self.bias else []
        kinds += ["weight_hr"] if self.proj_size > 0 else []
        kinds += NORMS if self.layer_norm else []
        cell, kind = divmod(position, len(kinds))
        layer, direction = divmod(cell, 1 + self.bidirectional)
        return f"{kinds[kind]}_l{layer}{'_reverse' if direction else ''}"


def check_rules(
    recurrent_dropout: float,
    zoneout_h: float,
    zoneout_c: float,
    cell_clip: float | None,
    proj_size: int,
    layer_norm: bool,
) -> CellRules | None:
    """What cells do beyond ``nn.LSTM``'s; None for nothing.

    Raises:
        ValueError: a number out of range, or zoneout or layer_norm with a projection.
    """
    given = {"recurrent_dropout": recurrent_dropout, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} should be a number in range [0, 1], got {value}")
    if cell_clip is not None and not cell_clip > 0:
        raise ValueError(f"cell_clip should be a positive number or None, got {cell_clip}")
    if proj_size > 0 and (zoneout_h > 0 or zoneout_c > 0):
        raise ValueError(f"zoneout: expected proj_size=0, got {proj_size}")
    if proj_size > 0 and layer_norm:
        raise ValueError(f"layer_norm: expected proj_size=0, got {proj_size}")
    rules = CellRules(recurrent_dropout, zoneout_h, zoneout_c, cell_clip or 0.0)
    return rules if any(rules) else None


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
        # nn.LSTM meets a packed input of another dtype only inside its kernels.
        raise (RuntimeError if packed else ValueError)(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({like.dtype}). "
            f"Convert input: input.to({like.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.shape[-1] != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.shape[-1]}"
        )


def check_state_sizes(h0: Tensor, c0: Tensor, sizes: Sizes, batch: int) -> None:
    """Raise RuntimeError where a state of ``(L*D, B, width)`` is of another shape."""
    for i, (state, width) in enumerate(((h0, sizes.out_size), (c0, sizes.hidden_size))):
        if state.shape != (sizes.cells, batch, width):
            raise RuntimeError(
                f"Expected hidden[{i}] size {(sizes.cells, batch, width)}, got {list(state.shape)}"
            )


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


def check_weights(weights: Sequence[Tensor], sizes: Sizes, *, of_cell: bool = False) -> None:
    """Raise RuntimeError where a weight is of another shape or dtype.

    Args:
        of_cell: whether they are an ``LSTMCell``'s, whose names lack the layer's number.
    """

    def name(position: int) -> str:
        found = sizes.weight_name(position)
        return found.removesuffix("_l0") if of_cell else found

    dtype, expected = weights[0].dtype, sizes.weight_shapes()
    if [w.dtype for w in weights] != [dtype] * len(weights):
        found = {name(i): w.dtype for i, w in enumerate(weights)}
        raise RuntimeError(f"parameters must have one dtype, got {found}")
    if [w.shape for w in weights] != expected:
        i = next(i for i, w in enumerate(weights) if w.shape != expected[i])
        raise RuntimeError(
            f"{name(i)} must have shape {expected[i]}, got {tuple(weights[i].shape)}"
        )


def readable(x: Tensor) -> bool:
    """Whether x's values may be looked at: not those of a tracer, nor through a device's queue."""
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
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be whole numbers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must have one element for each of {batch} sequences, "
            f"got shape {tuple(lengths.shape)}"
        )
    lengths = lengths.to(torch.int64)
    if batch == 0 or not readable(lengths):
        return lengths
    low, high = (int(x) for x in torch.aminmax(lengths))
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
    if input.numel() == 1:  # one character at a time: the cheapest way to look
        low = high = input.item()
    else:
        low, high = (x.item() for x in torch.aminmax(input))
    if low < 0 or high >= input_size:
        value = low if low < 0 else high
        raise IndexError(
            f"input holds the index {value}, expected 0 to {input_size - 1} "
            f"(input_size is {input_size})"
        )
