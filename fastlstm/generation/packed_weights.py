"""Weights as the kernels that draw text read them: csrc/generate.h describes the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..stack import Stack

__all__ = ["PackedLSTM", "pack", "rounded"]

_COLUMNS = 64
_GATES = 4
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False, repr=False)
class PackedLSTM:
    """An LSTM and its decoder, copied and packed for :func:`fastlstm.generate`.

    Later changes of the module's parameters do not reach it. It is plain data: it can be pickled,
    and serves every processor, or every GPU, whichever the module was on.

    Attributes:
        stack: sizes and options of the LSTM; ``input_size`` is the vocabulary.
        weights: how they are stored: "fp32", "fp64", "bf16", "fp16" or "int8".
        dtype: of the module that they came from.
        computed: float64 for "fp64", else float32.
    """

    stack: Stack
    weights: str
    dtype: torch.dtype
    computed: torch.dtype
    table: Tensor
    matrices: list[Tensor]
    biases: list[Tensor]
    scales: list[Tensor]

    @property
    def nbytes(self) -> int:
        """What the packed weights occupy."""
        return sum(x.nbytes for x in [self.table, *self.matrices, *self.biases, *self.scales])

    def __repr__(self) -> str:
        s = self.stack
        projection = f", proj_size={s.proj_size}" if s.proj_size else ""
        return (
            f"PackedLSTM({s.input_size}, {s.hidden_size}, num_layers={s.num_layers}{projection}, "
            f"weights={self.weights!r}, {self.nbytes:,} bytes)"
        )


def pack(
    weights: Sequence[Tensor],
    stack: Stack,
    decoder: Tensor,
    decoder_bias: Tensor | None,
    storage: str,
    words: bool = True,
) -> PackedLSTM:
    """Pack the weights of a unidirectional stack and its decoder. Nothing is checked here.

    words: several columns in every 32-bit word, for CPUs; GPUs read one column an element.
    """
    computed = torch.float64 if storage == "fp64" else torch.float32
    matrices: list[Tensor] = []
    scales: list[Tensor] = []

    def add(weight: Tensor, gates: int = 1) -> None:
        matrix, scale = _stored(weight, storage)
        columns = _columns(matrix, gates)
        matrices.append(_words(columns, storage) if words else columns.contiguous())
        if scale is not None:
            scales.append(_columns(scale, gates))

    table, biases = weights[0], []
    copies = [w.detach().to(computed) for w in weights]
    each = len(weights) // stack.num_layers
    for layer in range(stack.num_layers):
        w_ih, w_hh, *rest = copies[layer * each : (layer + 1) * each]
        bias = rest[0] + rest[1] if stack.bias else w_ih.new_zeros(len(w_ih))
        if layer == 0:
            columns = _columns(w_ih + bias[:, None], _GATES)
            table = columns.transpose(0, 1).reshape(stack.input_size, -1)
        else:
            add(w_ih, _GATES)
            biases.append(_columns(bias[:, None], _GATES))
        add(w_hh, _GATES)
        if stack.proj_size:
            add(rest[-1])
    decoder = decoder.detach().to(computed)
    add(decoder)
    last = decoder.new_zeros(len(decoder)) if decoder_bias is None else decoder_bias.detach()
    biases.append(_columns(last.to(computed)[:, None], 1))
    dtype = weights[0].dtype
    return PackedLSTM(stack, storage, dtype, computed, table, matrices, biases, scales)


def rounded(weight: Tensor, storage: str) -> Tensor:
    """``weight``, 2-D float32, as it reads back from "fp32", "bf16" or "int8" storage."""
    values, scale = _stored(weight, storage)
    return values.to(weight.dtype) if scale is None else values * scale


def _stored(weight: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """The values to store and, for int8, the ``(N, 1)`` factor of every row that restores them."""
    if storage in _HALF:
        return weight.to(_HALF[storage]), None
    if storage != "int8":
        return weight, None
    scale = weight.abs().amax(1, keepdim=True) / 127
    scale = scale.masked_fill(scale == 0, 1)
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def _columns(weight: Tensor, gates: int) -> Tensor:
    """``(N, K)`` to panels ``(panels, K, 64)``; with four gates, 16 columns of each."""
    each, n = _COLUMNS // gates, len(weight) // gates
    panels = -(-n // each)
    split = F.pad(weight.view(gates, n, -1), (0, 0, 0, panels * each - n))
    return split.view(gates, panels, each, -1).permute(1, 3, 0, 2).reshape(panels, -1, _COLUMNS)


def _words(columns: Tensor, storage: str) -> Tensor:
    """Two bf16 columns in every 32-bit word, two rows of int8 in every 16-bit word."""
    if storage == "bf16":
        low, high = columns.view(torch.int16).to(torch.int32).split(32, -1)
        return (high << 16) | (low & 0xFFFF)
    if storage == "int8":
        even = F.pad(columns, (0, 0, 0, columns.shape[1] % 2)).to(torch.int16)
        return (even[:, ::2] & 0xFF) | (even[:, 1::2] << 8)
    return columns
