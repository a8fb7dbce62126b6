"""Registers with torch what the operators need beside kernels: autograd, fake and vmap rules.

A direct call of a raw operator (torch.ops.fastlstm) has its gradient through the functions of
autograd.py; below autograd are the native kernels. vmap.py has the rules under torch.func's vmap;
the one for a batch of gradients (``is_grads_batched``) is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import readable
from ..stack import INDEX_TYPES
from .autograd import LSTMBackward, LSTMFunction, requires_grad
from .native import DTYPES, from_scalars
from .vmap import Rule, forward_rule, one_by_one

__all__: list[str] = []


def _forward_autograd(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and requires_grad(input, h0, c0, *weights):
        *scalars, save = arguments
        results = LSTMFunction.apply(
            input, h0, c0, batch_sizes, seed, tuple(scalars), False, *weights
        )
        # A graph that was made without gradients may be called with them. What backward needs is
        # then kept, but the graph gets what it was made with: nothing.
        return results if save else (*results[:3], *(x[:0] for x in results[3:]))
    _refuse_tangents(input, h0, c0, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastlstm.forward(input, h0, c0, weights, batch_sizes, seed, *arguments)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise where forward mode comes to the operator itself: it would go on without a tangent."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "fastlstm::forward has no forward-mode derivative: it has one where a fastlstm.LSTM is "
            "called, not a graph that was exported or traced"
        )


def _backward_autograd(  # the operator's arguments
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    hidden: Tensor,
    gates: Tensor,
    cells: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    grads, saved = (grad_output, grad_h_n, grad_c_n, grad_cells), (output, hidden, gates, cells)
    if torch.is_grad_enabled() and requires_grad(*grads, input, h0, c0, *weights):
        *scalars, needs = arguments
        grad_input, grad_h0, grad_c0, *grad_weights = LSTMBackward.apply(
            tuple(scalars), needs, *grads, batch_sizes, seed, *saved, input, h0, c0, *weights
        )
        return grad_input, grad_h0, grad_c0, grad_weights
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastlstm.backward(
            *grads, input, h0, c0, weights, batch_sizes, seed, *saved, *arguments
        )


def _backward_batched(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """For ``autograd.grad(is_grads_batched=True)``, which uses the vmap before torch.func's.

    There torch itself calls an operator gradient by gradient, unless it has lists of tensors.
    """
    before, weights, behind = arguments[:7], arguments[7], arguments[8:]
    flat_weights, input_size = torch.cat([w.flatten() for w in weights]), weights[0].shape[1]
    flat = torch.ops.fastlstm._backward_flat(*before, flat_weights, input_size, *behind)
    grad_input, grad_h0, grad_c0, *rest = _unflatten(flat, _gradient_shapes(*arguments))
    return grad_input, grad_h0, grad_c0, rest


def _backward_flat(*arguments: Any) -> Tensor:
    """The backward operator of weights in one vector; its gradients in one vector too."""
    before, (weights, input_size), behind = arguments[:7], arguments[7:9], arguments[9:]
    stack, _ = from_scalars(arguments[15:-1], input_size)
    *first, grad_weights = torch.ops.fastlstm.backward(
        *before, _unflatten(weights, stack.weight_shapes()), *behind
    )
    return torch.cat([x.flatten() for x in (*first, *grad_weights)])


def _unflatten(x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    counts = [math.prod(shape) for shape in shapes]
    starts = accumulate(counts, initial=0)
    return [  # split has no rule under the older vmap
        x.narrow(0, start, count).view(shape)
        for start, count, shape in zip(starts, counts, shapes, strict=False)
    ]


_schema = str(torch.ops.fastlstm.backward.default._schema).removeprefix("fastlstm::")
_arguments = _schema.partition(" -> ")[0].replace(
    "Tensor[] weights", "Tensor weights, int input_size"
)

_library = torch.library.Library("fastlstm", "FRAGMENT")
_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_autograd, "Autograd")
_library.define(f"_{_arguments} -> Tensor".replace("_backward", "_backward_flat"))
_library.impl("backward", _backward_batched, "Batched")
_library.impl("_backward_flat", _backward_flat, "CompositeImplicitAutograd")


@torch.library.register_vmap("fastlstm::forward")
def _forward_vmap(info: Any, in_dims: tuple, *args: Any) -> Rule:
    return forward_rule(torch.ops.fastlstm.forward, info.batch_size, in_dims, args)


@torch.library.register_vmap("fastlstm::backward")
def _backward_vmap(info: Any, in_dims: tuple, *args: Any) -> Rule:
    return one_by_one(torch.ops.fastlstm.backward, info.batch_size, in_dims, args)


@torch.library.register_fake("fastlstm::forward")
def _forward_fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *scalars, save = arguments
    like = weights[0]
    stack, _ = from_scalars(tuple(scalars), like.shape[1])
    width = stack.directions * stack.out_size
    if batch_sizes is None:
        leading: tuple = tuple(input.shape[:2])
        rows = input.shape[0] * input.shape[1]
    else:
        leading = (input.shape[0],)
        rows = input.shape[0]
    batch = _sequences(input, h0, c0, batch_sizes)
    saved_layers = stack.pseudo_layers if save else 0
    saved_per_unit = 12 if stack.layer_norm else 4  # csrc/lstm.h
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (
        like.new_empty(*leading, width),
        like.new_empty(stack.pseudo_layers, batch, stack.out_size),
        like.new_empty(stack.pseudo_layers, batch, stack.hidden_size),
        like.new_empty(stack.num_layers - 1 if save else 0, rows, width),
        like.new_empty(saved_layers, rows, saved_per_unit * stack.hidden_size),
        like.new_empty(saved_layers, rows, stack.hidden_size, dtype=accumulated),
    )


def _gradient_shapes(*arguments: Any) -> list[Sequence[int]]:
    """Shapes of all gradients in their order; ``(0,)`` where no gradient is needed."""
    input, h0, c0, weights = arguments[4:8]  # behind the gradients that arrive
    differentiable = None if input.dtype in INDEX_TYPES else input
    return [
        x.shape if need and x is not None else (0,)
        for need, x in zip(arguments[-1], (differentiable, h0, c0, *weights), strict=True)
    ]


@torch.library.register_fake("fastlstm::backward")
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    like = arguments[7][0]
    grad_input, grad_h0, grad_c0, *grad_weights = map(like.new_empty, _gradient_shapes(*arguments))
    return grad_input, grad_h0, grad_c0, grad_weights


@torch.library.register_fake("fastlstm::_activations")
def _activations_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("fastlstm::_forward_packed")
def _forward_packed_fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    packed: int,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    pseudo_layers, directions, out_size, hidden_size, dtype = sizes
    leading = input.shape[:2] if batch_sizes is None else input.shape[:1]
    batch = _sequences(input, h0, c0, batch_sizes)
    return tuple(  # type: ignore[return-value]
        input.new_empty(shape, dtype=DTYPES[dtype])
        for shape in (
            (*leading, directions * out_size),
            (pseudo_layers, batch, out_size),
            (pseudo_layers, batch, hidden_size),
        )
    )


def _sequences(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, batch_sizes: Tensor | None
) -> int | torch.SymInt:
    """How many sequences there are: of packed ones a state knows it, else only the data."""
    if batch_sizes is None:
        return input.shape[1]
    state = h0 if h0 is not None else c0
    if state is not None:
        return state.shape[1]
    if readable(batch_sizes):  # beside input on the meta device
        return int(batch_sizes[0])
    return torch.library.get_ctx().new_dynamic_size()
