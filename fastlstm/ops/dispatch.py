"""Runs a checked call: on the kernels, or on torch's own LSTM where there are none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import seed_on
from ..stack import INDEX_TYPES, Call, Stack, State
from . import autograd
from .native import kernels_missing

__all__ = ["run_stack"]

_warned: set[str] = set()


def run_stack(
    input: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call,
    draws: bool = False,
) -> tuple[Tensor, ...]:
    """``output, h_n, c_n``, and with ``return_cells`` ``(L*D, R, H)``, of checked arguments.

    Args:
        input: time-major ``(T, B, I)`` or indices ``(T, B)``; packed ``(R, I)`` or ``(R,)``.
        state: batched, or None for zeros.
        call: whose seed is the user's, or None.
        draws: whether the call needs a seed.

    Raises:
        NotImplementedError: an option that torch's own LSTM lacks, where there are no kernels.
    """
    missing = kernels_missing(weights[0])
    if missing is not None:
        return _run_torch(missing, input, state, weights, stack, call)
    if draws:
        call = call._replace(seed=seed_on(weights[0].device, call.seed))
    elif call.seed is not None:
        call = call._replace(seed=None)
    return autograd.lstm(input, state, weights, stack, call)


def _run_torch(
    missing: str,
    input: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_options_without_kernels(missing, stack, call)
    if not torch.compiler.is_compiling() and missing not in _warned:
        _warned.add(missing)
        warnings.warn(f"fastlstm runs torch's own LSTM here: {missing}", stacklevel=2)
    dropout, seed, batch_sizes, _ = call
    if seed is not None and dropout > 0:
        raise NotImplementedError(f"dropout from a given seed needs fastlstm's kernels: {missing}")
    like = weights[0]
    if input.dtype in INDEX_TYPES:
        input = F.one_hot(input.long(), stack.input_size).to(like.dtype)
    if state is None:
        batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
        state = (
            like.new_zeros(stack.pseudo_layers, batch, stack.out_size),
            like.new_zeros(stack.pseudo_layers, batch, stack.hidden_size),
        )
    # train=True, for cuDNN has no backward otherwise; in evaluation dropout is already 0.
    options = (stack.bias, stack.num_layers, dropout, True, stack.bidirectional)
    vf: Any = torch._VF
    if batch_sizes is not None:
        return vf.lstm(input, batch_sizes, state, weights, *options)
    return vf.lstm(input, state, weights, *options, False)


def _refuse_options_without_kernels(missing: str, stack: Stack, call: Call) -> None:
    if call.return_cells:
        raise NotImplementedError(f"return_cells needs fastlstm's kernels: {missing}")
    if stack.has_rules:
        raise NotImplementedError(
            "recurrent_dropout, zoneout_h, zoneout_c and cell_clip need fastlstm's kernels: "
            f"{missing}"
        )
    if stack.layer_norm:
        raise NotImplementedError(f"layer_norm needs fastlstm's kernels: {missing}")
