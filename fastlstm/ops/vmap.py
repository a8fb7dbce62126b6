"""The operators' rules under torch.func.vmap.

A stack whose weights all samples share runs once, over a batch that holds the batches of all of
them. Samples that have weights of their own (an ensemble), or that want gradients of their own for
shared ones, run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = tuple[tuple, tuple]  # results, and the dimension of each that counts the samples


def _batched(dim: Any) -> bool:
    return any(map(_batched, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _sample(argument: Any, dim: Any, v: int) -> Any:
    if not _batched(dim):
        return argument
    if isinstance(argument, (list, tuple)):
        return [_sample(x, d, v) for x, d in zip(argument, dim, strict=True)]
    return argument.select(dim, v)


def one_by_one(call: Callable, size: int, dims: Sequence[Any], args: Sequence[Any]) -> Rule:
    """Call for every sample, and stack what comes back: tensors and lists of tensors."""
    by_sample = [
        call(*(_sample(x, d, v) for x, d in zip(args, dims, strict=True))) for v in range(size)
    ]
    results = tuple(
        [torch.stack(x) for x in zip(*same, strict=True)]
        if isinstance(same[0], (list, tuple))
        else torch.stack(same)
        for same in zip(*by_sample, strict=True)
    )
    return results, tuple([0] * len(x) if isinstance(x, list) else 0 for x in results)


def forward_rule(call: Callable, size: int, dims: Sequence[Any], args: Sequence[Any]) -> Rule:
    """``call`` has the forward operator's arguments and results."""
    input, h0, c0, weights, batch_sizes, seed, *rest = args
    # Packed sequences have no batch dimension to join, and with one seed every sample has to drop
    # the same elements.
    if _batched(dims[3:]) or batch_sizes is not None or seed is not None:
        return one_by_one(call, size, dims, args)

    def join(x: Tensor | None, dim: int | None) -> Tensor | None:
        """``(A, B, ...)`` of every sample as ``(A, size * B, ...)``."""
        if x is None:
            return None
        x = x.unsqueeze(1).expand(-1, size, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
        return x.flatten(1, 2)

    def split(x: Tensor, steps: int) -> Tensor:
        """``(A, steps * size * B, ...)`` as ``(size, A, steps * B, ...)``."""
        x = x.unflatten(1, (steps, size, x.shape[1] // (steps * size)))
        return x.movedim(2, 0).flatten(2, 3)

    joined = [join(x, dim) for x, dim in zip((input, h0, c0), dims[:3], strict=True)]
    results = call(*joined, weights, None, None, *rest)
    steps = [1, 1, 1, *[input.shape[0 if dims[0] != 0 else 1]] * 3]
    return tuple(split(x, s) for x, s in zip(results, steps, strict=True)), (0,) * 6
