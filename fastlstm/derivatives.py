"""Derivatives that no kernel computes: those of the equations in PyTorch, by torch.func.

Forward-mode ones of the stack, and all of the backward operator's. Right, and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .native import Options

__all__ = ["OfBackward", "equations", "push_forward"]


def equations(
    operands: Sequence[Any], batch_sizes: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    """The forward operator's results: output, h_n, c_n and the cell states of every step.

    Args:
        operands: input, h0, c0 and the weights.
    """
    input, h0, c0, *weights = operands
    given = options._asdict()
    del given["allow_tf32"], given["algorithm"]
    *results, cells = reference.lstm(
        input, h0, c0, weights, seed=seed, batch_sizes=batch_sizes, return_cells=True, **given
    )
    # In the type that the kernels keep them in.
    return (*results, cells if cells.dtype == torch.float64 else cells.float())


def push_forward(
    operands: Sequence[Any],
    tangents: Sequence[Any],
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """Tangents of the results of :func:`equations` from those of the operands, None for zero."""
    places = [j for j, x in enumerate(tangents) if x is not None]

    def stack(*own: Tensor) -> tuple[Tensor, ...]:
        return equations(_put(operands, places, own), batch_sizes, seed, options)

    outputs, pull, *_ = torch.func.vjp(stack, *(operands[j] for j in places))
    return _transposed(pull, outputs, tuple(tangents[j] for j in places))


def _transposed(pull: Any, outputs: tuple[Tensor, ...], tangents: tuple) -> tuple[Tensor, ...]:
    """What a function pushes forward: its pull is linear, and the pull of that is the push."""
    push = torch.func.vjp(pull, tuple(torch.zeros_like(y) for y in outputs))[1]
    return push(tangents)[0]


def _put(into: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    found = list(into)
    for j, value in zip(places, values, strict=True):
        found[j] = value
    return found


class OfBackward:
    """The backward operator as a function of the gradients that arrive and of the operands.

    Args:
        options, batch_sizes, seed: the operator's.
        grads: those that arrive at output, h_n, c_n and the cell states; None for zero.
        operands: input, h0, c0 and the weights.
        wanted: whose gradient, of the operands', is differentiated.
    """

    def __init__(
        self,
        options: Options,
        batch_sizes: Tensor | None,
        seed: Tensor | None,
        grads: Sequence[Tensor | None],
        operands: Sequence[Any],
        wanted: Sequence[bool],
    ) -> None:
        self.options, self.batch_sizes, self.seed = options, batch_sizes, seed
        self.operands = operands
        self.used = [j for j, grad in enumerate(grads) if grad is not None]
        self.floats = [j for j, x in enumerate(operands) if x is not None and x.is_floating_point()]
        self.chosen = [j for j in self.floats if wanted[j]]
        self.at = (
            tuple(grads[j] for j in self.used),
            tuple(operands[j] for j in self.floats),
        )

    def gradients(self, grads: tuple, operands: tuple) -> tuple[Tensor, ...]:
        """Of the chosen operands."""

        def stack(*own: Tensor) -> tuple[Tensor, ...]:
            every = _put(self.operands, self.floats, own)
            found = equations(every, self.batch_sizes, self.seed, self.options)
            return tuple(found[j] for j in self.used)

        pull = torch.func.vjp(stack, *operands)[1]
        by_place = dict(zip(self.floats, pull(grads), strict=True))
        return tuple(by_place[j] for j in self.chosen)

    def pull_back(self, cotangents: Sequence[Tensor | None]) -> tuple[list, list]:
        """Gradients of the arriving gradients and of the operands, from those of the results."""
        pull = torch.func.vjp(self.gradients, *self.at)[1]
        to_grads, to_operands = pull(tuple(cotangents[j] for j in self.chosen))
        return (
            _put([None] * 4, self.used, to_grads),
            _put([None] * len(self.operands), self.floats, to_operands),
        )

    def push_forward(self, grads: Sequence[Any], operands: Sequence[Any]) -> list[Tensor]:
        """Tangents of all operands' gradients, from those of what the operator was given."""
        tangents = tuple(
            tuple(
                torch.zeros_like(x) if given[j] is None else given[j]
                for j, x in zip(places, at, strict=True)
            )
            for given, places, at in zip(
                (grads, operands), (self.used, self.floats), self.at, strict=True
            )
        )
        outputs, pull, *_ = torch.func.vjp(self.gradients, *self.at)
        found = _transposed(pull, outputs, tangents)
        like = self.operands[-1]
        return _put([like.new_zeros(0)] * len(self.operands), self.chosen, found)
