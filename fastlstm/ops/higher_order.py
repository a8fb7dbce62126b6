"""Derivatives without a kernel: forward mode, and all derivatives of the backward operator.

torch.func computes them from the equations in PyTorch (reference.py), which is slow. Operands are
the tensors that have derivatives, in one order everywhere: input, h0, c0 and the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..stack import Call
from .native import Scalars, from_scalars

__all__ = ["BackwardFunction", "equations_of", "push_forward"]

Equations = Callable[[Sequence[Any]], tuple[Tensor, ...]]


def equations_of(batch_sizes: Tensor | None, seed: Tensor | None, scalars: Scalars) -> Equations:
    """The forward operator as a function of its operands: to output, h_n, c_n and every c."""

    def equations(operands: Sequence[Any]) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = operands
        stack, dropout = from_scalars(scalars, weights[0].shape[1])
        call = Call(dropout, seed, batch_sizes, return_cells=True)
        *results, cells = reference.lstm(input, (h0, c0), weights, stack, call)
        # The kernels keep c in float64 or float32.
        return (*results, cells if cells.dtype == torch.float64 else cells.float())

    return equations


def push_forward(
    operands: Sequence[Any],
    tangents: Sequence[Any],
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    scalars: Scalars,
) -> tuple[Tensor, ...]:
    """Tangents of the forward operator's results from those of its operands, None for zero."""
    equations = equations_of(batch_sizes, seed, scalars)
    places = [j for j, x in enumerate(tangents) if x is not None]

    def function(*moving: Tensor) -> tuple[Tensor, ...]:
        return equations(_put(operands, places, moving))

    outputs, vjp, *_ = torch.func.vjp(function, *(operands[j] for j in places))
    return _jvp(vjp, outputs, tuple(tangents[j] for j in places))


def _jvp(vjp: Any, outputs: tuple[Tensor, ...], tangents: tuple) -> tuple[Tensor, ...]:
    """A function's JVP as the VJP of its VJP, which is linear in the cotangents."""
    transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(y) for y in outputs))[1]
    return transposed(tangents)[0]


def _put(into: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A copy of ``into`` with the values at these places."""
    copy = list(into)
    for j, value in zip(places, values, strict=True):
        copy[j] = value
    return copy


class BackwardFunction:
    """The backward operator as a function of the gradients that arrive and of the operands.

    Args:
        equations: of the forward operator, as of :func:`equations_of`.
        grads: those that arrive at output, h_n, c_n and the cell states; None for zero.
        operands: at which it is differentiated.
        wanted: whose gradient, of the operands', is differentiated.
    """

    def __init__(
        self,
        equations: Equations,
        grads: Sequence[Tensor | None],
        operands: Sequence[Any],
        wanted: Sequence[bool],
    ) -> None:
        self.equations, self.operands = equations, operands
        # Places of the gradients that arrive, of the operands that are differentiable, and of
        # those whose gradients are differentiated.
        self.arriving = [j for j, grad in enumerate(grads) if grad is not None]
        self.floats = [j for j, x in enumerate(operands) if x is not None and x.is_floating_point()]
        self.wanted = [j for j in self.floats if wanted[j]]
        self.primals = (
            tuple(grads[j] for j in self.arriving),
            tuple(operands[j] for j in self.floats),
        )

    def gradients(self, grads: tuple, floats: tuple) -> tuple[Tensor, ...]:
        """Of the wanted operands."""

        def function(*floats: Tensor) -> tuple[Tensor, ...]:
            results = self.equations(_put(self.operands, self.floats, floats))
            return tuple(results[j] for j in self.arriving)

        vjp = torch.func.vjp(function, *floats)[1]
        by_place = dict(zip(self.floats, vjp(grads), strict=True))
        return tuple(by_place[j] for j in self.wanted)

    def vjp(self, cotangents: Sequence[Tensor | None]) -> tuple[list, list]:
        """Gradients of the arriving gradients and of the operands, from those of the results."""
        vjp = torch.func.vjp(self.gradients, *self.primals)[1]
        to_grads, to_operands = vjp(tuple(cotangents[j] for j in self.wanted))
        return (
            _put([None] * 4, self.arriving, to_grads),
            _put([None] * len(self.operands), self.floats, to_operands),
        )

    def jvp(self, grads: Sequence[Any], operands: Sequence[Any]) -> list[Tensor]:
        """Tangents of all operands' gradients, from those of the gradients and operands."""

        def dense(tangents: Sequence[Any], places: Sequence[int], primals: tuple) -> tuple:
            return tuple(
                torch.zeros_like(x) if tangents[j] is None else tangents[j]
                for j, x in zip(places, primals, strict=True)
            )

        tangents = (
            dense(grads, self.arriving, self.primals[0]),
            dense(operands, self.floats, self.primals[1]),
        )
        outputs, vjp, *_ = torch.func.vjp(self.gradients, *self.primals)
        results = _jvp(vjp, outputs, tangents)
        like = self.operands[-1]
        return _put([like.new_zeros(0)] * len(self.operands), self.wanted, results)
