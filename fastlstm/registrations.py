"""What torch asks of the operators beside their kernels: gradients of direct calls, and shapes.

A direct call of a raw operator (torch.ops.fastlstm) has its gradient through the functions of
ops.py; below autograd are the native kernels. Their rules under vmap are in transforms.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .native import Options
from .ops import How, LSTMBackward, LSTMFunction, requires_grad
from .reference import INDEX_TYPES

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
        *options, save = arguments
        if not save:
            raise RuntimeError("fastlstm::forward: save=False, but an input requires grad")
        how = How(Options(*options))
        return LSTMFunction.apply(input, h0, c0, batch_sizes, seed, how, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastlstm.forward(input, h0, c0, weights, batch_sizes, seed, *arguments)


def _backward_autograd(
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
        *options, needs = arguments
        found = LSTMBackward.apply(
            Options(*options), needs, *grads, batch_sizes, seed, *saved, input, h0, c0, *weights
        )
        return found[0], found[1], found[2], list(found[3:])
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastlstm.backward(
            *grads, input, h0, c0, weights, batch_sizes, seed, *saved, *arguments
        )


_library = torch.library.Library("fastlstm", "IMPL")
_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_autograd, "Autograd")


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
    *given, save = arguments
    options, like = Options(*given), weights[0]
    cells, wide = options.num_layers * options.directions, options.directions * options.out_size
    if batch_sizes is None:
        leading: tuple = tuple(input.shape[:2])
        rows = input.shape[0] * input.shape[1]
        batch: int | torch.SymInt = input.shape[1]
    else:
        leading = (input.shape[0],)
        rows = input.shape[0]
        # How many sequences there are stands in the data of batch_sizes, unless a state says it.
        state = h0 if h0 is not None else c0
        batch = state.shape[1] if state is not None else torch.library.get_ctx().new_dynamic_size()
    saved_per_unit = 12 if options.layer_norm else 4  # csrc/lstm.h
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (
        like.new_empty(*leading, wide),
        like.new_empty(cells, batch, options.out_size),
        like.new_empty(cells, batch, options.hidden_size),
        like.new_empty(options.num_layers - 1 if save else 0, rows, wide),
        like.new_empty(cells if save else 0, rows, saved_per_unit * options.hidden_size),
        like.new_empty(cells if save else 0, rows, options.hidden_size, dtype=accumulated),
    )


@torch.library.register_fake("fastlstm::backward")
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    input, h0, c0, weights = arguments[4:8]  # behind the gradients that arrive
    need_input, need_h0, need_c0, *need_weights = arguments[-1]

    def gradient(needed: bool, like: Tensor | None) -> Tensor:
        shape = like.shape if needed and like is not None else (0,)
        return weights[0].new_empty(shape)

    return (
        gradient(need_input and input.dtype not in INDEX_TYPES, input),
        gradient(need_h0, h0),
        gradient(need_c0, c0),
        [gradient(need, w) for need, w in zip(need_weights, weights, strict=True)],
    )


@torch.library.register_fake("fastlstm::_activations")
def _activations_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
