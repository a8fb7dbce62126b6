"""Packing weights once for many calls: :func:`fastlstm.prepack`, and what it returns."""

from __future__ import annotations

from typing import overload

from torch import nn
from torch.nn.modules.rnn import RNNBase

from .frozen import FrozenLSTM
from .generation import generate
from .generation.packed_weights import PackedLSTM

__all__ = ["FrozenLSTM", "PackedLSTM"]


@overload
def prepack(lstm: RNNBase, decoder: None = None, weights: None = None) -> FrozenLSTM: ...


@overload
def prepack(lstm: RNNBase, decoder: nn.Linear, weights: str | None = None) -> PackedLSTM: ...


def prepack(
    lstm: RNNBase, decoder: nn.Linear | None = None, weights: str | None = None
) -> FrozenLSTM | PackedLSTM:
    """Copy and pack an LSTM's weights, to be used as often as one likes.

    Without a decoder, for calls of the layer: the result is a module that is called as the LSTM,
    for inference on the CPU. With a decoder, for :func:`fastlstm.generate`.

    Args:
        lstm: a ``fastlstm.LSTM`` or ``nn.LSTM``; without a decoder on the CPU, with one as for
            :func:`fastlstm.generate`, on a CPU or a GPU.
        decoder: as for :func:`fastlstm.generate`.
        weights: with a decoder, how they are stored: "fp32", the default; "bf16", half as large
            and faster; "int8", a quarter, with a factor for every row, faster still. The first
            layer's input weights, one column a step, and the biases stay float32. On the CPU all
            compute in float32, but products with "int8" read h in 16 bits. On a GPU also "fp16",
            and all but "fp32" round h; "int8" is held there, exactly, as bf16. Without a decoder
            they keep the module's dtype.

    Returns:
        A :class:`fastlstm.packing.FrozenLSTM`, or with a decoder a
        :class:`fastlstm.packing.PackedLSTM`. They do not follow later changes of the parameters.

    Raises:
        TypeError: lstm or decoder is of another type.
        ValueError: ``weights`` without a decoder; with one as :func:`fastlstm.generate`, and for
            another name, where a weight is no number (on the CPU) or, with "int8", no finite one,
            and on a GPU for a module that it runs step by step.
        RuntimeError: without a decoder a module elsewhere than on the CPU or without kernels for
            its dtype; a parameter of the wrong shape, dtype or device.
    """
    if decoder is not None:
        return generate.prepack(lstm, decoder, "fp32" if weights is None else weights)
    if weights is not None:
        raise ValueError(
            f"weights: expected None without a decoder, for they keep lstm's dtype; got {weights!r}"
        )
    return FrozenLSTM(lstm)
