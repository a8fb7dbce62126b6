"""What runs checked arguments: the kernels, or torch's own LSTM where there are none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .checks import Sizes
from .lengths import shut
from .native import kernels_missing
from .reference import INDEX_TYPES, CellRules

__all__ = ["run", "run_shut"]

_warned: set[str] = set()


def run(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    sizes: Sizes,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    seed: Tensor | None = None,
    draws: bool = False,
    return_cells: bool = False,
    rules: CellRules | None = None,
) -> tuple[Tensor, ...]:
    """``output, h_n, c_n``, and with ``return_cells`` ``(L*D, R, H)``, of checked arguments.

    Args:
        input, batch_sizes: time-major ``(T, B, I)`` or indices ``(T, B)``; packed ``(R, I)`` or
            ``(R,)``.
        h0, c0: batched, or None for zeros.
        dropout: 0 where nothing is dropped now.
        seed: the user's, or None.
        draws: whether the call needs a seed.
        rules: what the cells do in this call, or None.

    Raises:
        NotImplementedError: an option that torch's own LSTM lacks, where there are no kernels.
    """
    missing = kernels_missing(weights[0])
    if missing is not None:
        if return_cells:
            raise NotImplementedError(f"return_cells needs fastlstm's kernels: {missing}")
        if rules is not None:
            raise NotImplementedError(
                "recurrent_dropout, zoneout_h, zoneout_c and cell_clip need fastlstm's kernels: "
                f"{missing}"
            )
        if sizes.layer_norm:
            raise NotImplementedError(f"layer_norm needs fastlstm's kernels: {missing}")
        return _run_torch(missing, input, h0, c0, weights, sizes, dropout, batch_sizes, seed)
    return ops.lstm(
        input,
        h0,
        c0,
        weights,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        has_bias=sizes.bias,
        proj_size=sizes.proj_size,
        bidirectional=sizes.bidirectional,
        dropout=dropout,
        seed=_seed_on(input.device, seed) if draws else None,
        batch_sizes=batch_sizes,
        return_cells=return_cells,
        layer_norm=sizes.layer_norm,
        **({} if rules is None else rules._asdict()),
    )


def _seed_on(device: torch.device, seed: Tensor | None) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
        raise RuntimeError(
            f"seed must be one int64 element on {device}, "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )
    return seed


def run_shut(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    sizes: Sizes,
    dropout: float,
    seed: Tensor | None,
    draws: bool,
    lengths: Tensor,
    return_cells: bool,
    rules: CellRules | None,
) -> tuple[Tensor, ...]:
    """The same for padded input of lengths that may not be read: see lengths.py.

    Raises:
        NotImplementedError: an option that padding would run along with.
    """
    if rules is not None and rules.drawn and draws:
        raise NotImplementedError(
            "recurrent_dropout and zoneout in training: expected lengths on the CPU"
        )

    if sizes.layer_norm:  # which would normalise what shuts the cells, too
        raise NotImplementedError("layer_norm: expected lengths on the CPU")

    def run_cell(x: Tensor, h: Tensor | None, c: Tensor | None, own: Sequence[Tensor]) -> Any:
        one = Sizes(own[0].shape[1], sizes.hidden_size, bias=sizes.bias, proj_size=sizes.proj_size)
        return run(x, h, c, own, one, return_cells=return_cells, rules=rules)

    return shut(
        run_cell,
        input,
        h0,
        c0,
        weights,
        lengths,
        num_layers=sizes.num_layers,
        directions=1 + sizes.bidirectional,
        dropout=dropout,
        seed=_seed_on(input.device, seed) if draws else None,
    )


def _run_torch(
    missing: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    sizes: Sizes,
    dropout: float,
    batch_sizes: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.compiler.is_compiling() and missing not in _warned:
        _warned.add(missing)
        warnings.warn(f"fastlstm runs torch's own LSTM here: {missing}", stacklevel=2)
    if seed is not None and dropout > 0:
        raise NotImplementedError(f"dropout from a given seed needs fastlstm's kernels: {missing}")
    like = weights[0]
    if input.dtype in INDEX_TYPES:
        input = F.one_hot(input.long(), sizes.input_size).to(like.dtype)
    batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
    if h0 is None or c0 is None:
        h0 = like.new_zeros(sizes.cells, batch, sizes.out_size)
        c0 = like.new_zeros(sizes.cells, batch, sizes.hidden_size)
    # train=True: dropout is already 0 in evaluation, and cuDNN refuses a backward otherwise.
    options = (sizes.bias, sizes.num_layers, dropout, True, sizes.bidirectional)
    vf: Any = torch._VF
    if batch_sizes is not None:
        return vf.lstm(input, batch_sizes, (h0, c0), weights, *options)
    return vf.lstm(input, (h0, c0), weights, *options, False)
