"""Random bits that depend on a seed and a place alone: which elements dropout keeps.

``csrc/dropout.h`` has the same for the kernels. Forward and backward draw the same bits, in any
order and with any number of threads, and nothing has to be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "OUTPUT",
    "U32",
    "UPDATE",
    "ZONE_C",
    "ZONE_H",
    "drop",
    "dropout_mask",
    "hashed_rows",
    "mix32",
    "scale",
    "seed_on",
]

# Streams of bits: for a layer's output, and for what a cell draws (see stack.Stack).
OUTPUT, UPDATE, ZONE_C, ZONE_H = range(4)

U32 = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """The 32-bit mixing function ``lowbias32`` of Chris Wellons' hash prospector, in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & U32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & U32
    return x ^ (x >> 16)


def hashed_rows(
    seed: Tensor, layer: int, direction: int, t: Tensor, b: Tensor, stream: int = OUTPUT
) -> Tensor:
    """int64 ``(R,)`` below 2^32, the hash of every row."""
    seed = seed.reshape(()).to(torch.int64)
    key = mix32((seed & U32) ^ mix32((seed >> 32) & U32))
    key = mix32(key ^ ((stream << 24) + 2 * layer + direction))
    return mix32(mix32(key ^ (t & U32)) ^ (b & U32))


def dropout_mask(
    seed: Tensor,
    layer: int,
    direction: int,
    t: Tensor,
    b: Tensor,
    units: int,
    p: float,
    stream: int = OUTPUT,
) -> Tensor:
    """Which elements survive dropout: a pure function of the seed and of the element's place.

    Args:
        seed: one int64 element.
        layer, direction: whose output is dropped.
        t: ``(R,)`` int64, the time step of each row.
        b: ``(R,)`` int64, the batch index of each row.
        units: width of the output of one direction.
        p: probability of dropping an element.
        stream: what is dropped: 0 for layers' outputs, 1 for r, 2 for z_c and 3 for z_h of
            :class:`fastlstm.stack.Stack`.

    Returns:
        bool ``(R, units)``, True where the element is kept.
    """
    row = hashed_rows(seed, layer, direction, t, b, stream)
    unit = (torch.arange(units, device=row.device) * 0x9E3779B9) & U32
    return mix32(row[:, None] ^ unit) >= int(p * 2**32)


def scale(p: float) -> float:
    """The factor of what dropout keeps."""
    return 0.0 if p >= 1 else 1 / (1 - p)


def drop(
    y: Tensor, seed: Tensor, layer: int, direction: int, t: Tensor, b: Tensor, p: float
) -> Tensor:
    """A layer's output ``(R, units)`` of one direction, as the next layer reads it."""
    keep = dropout_mask(seed, layer, direction, t, b, y.shape[-1], p)
    return torch.where(keep, y * scale(p), torch.zeros_like(y))


def seed_on(device: torch.device, seed: Tensor | None) -> Tensor:
    """The user's seed, or one from the device's default generator.

    Raises:
        TypeError: the user's seed is no tensor.
        RuntimeError: it is not one int64 element on that device.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be one int64 element on {device}, got {type(seed).__name__}")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
        raise RuntimeError(
            f"seed must be one int64 element on {device}, "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )
    return seed
