"""The public name of what :func:`fastlstm.prepack` returns."""

from .generation.packed_weights import PackedLSTM

__all__ = ["PackedLSTM"]
