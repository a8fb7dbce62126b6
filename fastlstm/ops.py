"""The native operators under autograd: the gradient, the gradient's gradient, forward mode.

``lstm`` is the one entry: same signature, shapes and semantics as ``reference.lstm``, which is its
oracle. Nothing here checks user input; that is ``functional.lstm``'s part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import algorithms, derivatives, native, transforms
from .native import Options

__all__ = ["How", "LSTMBackward", "LSTMFunction", "lstm", "requires_grad"]


def lstm(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    hidden_size: int,
    num_layers: int = 1,
    has_bias: bool = True,
    proj_size: int = 0,
    bidirectional: bool = False,
    dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    cell_clip: float = 0.0,
    layer_norm: bool = False,
    seed: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """The whole stack in one native call. Arguments and results are those of ``reference.lstm``.

    Raises:
        RuntimeError: a shape or dtype that the operator cannot read; ``functional.lstm`` gives
            the messages meant for users.
    """
    options = Options(
        hidden_size, num_layers, has_bias, proj_size, bidirectional, dropout, recurrent_dropout,
        zoneout_h, zoneout_c, cell_clip, layer_norm,
    )  # fmt: skip
    if weights[0].is_cuda:
        allow_tf32, algorithm = algorithms.settings()
        options = options._replace(allow_tf32=allow_tf32, algorithm=algorithm)
    how = How(options, return_cells)
    if _jvp_may_come():
        # A function's jvp is not itself differentiated forward: what it saved has lost the tangents
        # of other levels.
        if _transforms().count(torch._C._functorch.TransformType.Jvp) > 1:
            found = derivatives.equations((input, h0, c0, *weights), batch_sizes, seed, options)
            return found if return_cells else found[:3]
        result = _DualLSTMFunction.apply(input, h0, c0, batch_sizes, seed, how, *weights)
    elif torch.jit.is_tracing() and not return_cells:
        # A trace holds no function of Python. It may be differentiated, wherever it was made.
        result = torch.ops.fastlstm.forward(
            input, h0, c0, weights, batch_sizes, seed, *options, True
        )
    elif torch.is_grad_enabled() and requires_grad(input, h0, c0, *weights):
        result = LSTMFunction.apply(input, h0, c0, batch_sizes, seed, how, *weights)
    else:
        result = native.call(
            torch.ops.fastlstm.forward,
            *(input, h0, c0, weights, batch_sizes, seed, *options, return_cells),
        )
    return (*result[:3], result[5]) if return_cells else tuple(result[:3])


class How(NamedTuple):
    """What LSTMFunction is given besides tensors."""

    options: Options
    return_cells: bool = False  # whether the cell states of every step have a gradient


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd wants a gradient of one of these."""
    return any(x is not None and x.requires_grad for x in tensors)


class LSTMFunction(torch.autograd.Function):
    """The stack with its gradient: ``output, h_n, c_n`` and what backward reads again.

    The last of it, the cell states of every step, has a gradient where it is asked for.
    """

    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        seed: Tensor | None,
        how: How,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        return native.call(
            torch.ops.fastlstm.forward,
            *(input, h0, c0, weights, batch_sizes, seed, *how.options, True),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        input, h0, c0, batch_sizes, seed, how, *weights = inputs
        ctx.options, ctx.return_cells = how
        y, _, _, hidden, gates, cells = output
        ctx.mark_non_differentiable(hidden, gates, *() if how.return_cells else (cells,))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, seed, y, hidden, gates, cells, input, h0, c0, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need_input, need_h0, need_c0, _, _, _, *need_weights = ctx.needs_input_grad
        needs = [need_input, need_h0, need_c0, *need_weights]
        arriving = (*grads[:3], grads[5])
        if all(grad is None for grad in arriving):
            return (None,) * (len(needs) + 3)
        # create_graph=True leaves grad mode on here: the operator has its gradient itself.
        if _jvp_may_come():
            found = _DualLSTMBackward.apply(ctx.options, needs, *arriving, *ctx.saved_tensors)
        else:
            found = LSTMBackward.forward(ctx.options, needs, *arriving, *ctx.saved_tensors)
        found = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return (*found[:3], None, None, None, *found[3:])

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> transforms.Rule:
        def call(*flat: Any) -> tuple[Tensor, ...]:
            input, h0, c0, weights, batch_sizes, seed, how = flat
            return cls.apply(input, h0, c0, batch_sizes, seed, how, *weights)

        def ordered(x: tuple) -> tuple:
            return (*x[:3], list(x[6:]), *x[3:5], x[5])

        size = info.batch_size
        return transforms.forward_rule(call, size, ordered(in_dims), ordered(args))


def _transforms() -> list[Any]:
    """torch.func's transforms that are in force, the outermost first."""
    return [x.key() for x in torch._C._functorch.get_interpreter_stack() or []]


def _jvp_may_come() -> bool:
    """Whether forward mode may ask: in its levels, and in all of torch.func's transforms."""
    if torch.compiler.is_compiling():  # Dynamo refuses a function that has a jvp
        return False
    return forward_ad._current_level >= 0 or bool(_transforms())


class _DualLSTMFunction(LSTMFunction):
    """With forward-mode derivatives: those of the reference, by differentiating its vjp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        LSTMFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*_operands(inputs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        batch_sizes, seed, *operands = ctx.saved_tensors
        *first, cells = derivatives.push_forward(
            operands, _operands(tangents)[2:], batch_sizes, seed, ctx.options
        )
        return (*first, None, None, cells if ctx.return_cells else None)


def _operands(arguments: Sequence[Any]) -> list[Any]:
    """LSTMFunction's arguments without the options: lengths and seed, input, states, weights."""
    input, h0, c0, batch_sizes, seed, _, *weights = arguments
    return [batch_sizes, seed, input, h0, c0, *weights]


def _split(tensors: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """The tensors of LSTMBackward: gradients; lengths and seed; saved; input, states, weights."""
    return tensors[:4], tensors[4:6], tensors[6:10], tensors[10:]


class LSTMBackward(torch.autograd.Function):
    """The native backward; its own gradient differentiates the reference."""

    @staticmethod
    def forward(options: Options, needs: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
        grads, (batch_sizes, seed), saved, operands = _split(tensors)
        input, h0, c0, *weights = operands
        grad_input, grad_h0, grad_c0, grad_weights = native.call(
            torch.ops.fastlstm.backward,
            *(*grads, input, h0, c0, weights, batch_sizes, seed, *saved, *options, needs),
        )
        return (grad_input, grad_h0, grad_c0, *grad_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.options, ctx.needs, *tensors = inputs
        grads, (batch_sizes, seed), _, operands = _split(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, seed, *grads, *operands)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [grad is not None for grad in grad_grads]
        if not any(wanted):
            return (None,) * (6 + len(ctx.saved_tensors))
        wanted = [a and b for a, b in zip(wanted, ctx.needs, strict=True)]
        to_grads, to_operands = _of_backward(ctx, wanted).pull_back(grad_grads)
        return (None, None, *to_grads, *(None,) * 6, *to_operands)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> transforms.Rule:
        return transforms.one_by_one(cls.apply, info.batch_size, in_dims, args)


def _of_backward(ctx: Any, wanted: Sequence[bool]) -> derivatives.OfBackward:
    batch_sizes, seed, *tensors = ctx.saved_tensors
    return derivatives.OfBackward(ctx.options, batch_sizes, seed, tensors[:4], tensors[4:], wanted)


class _DualLSTMBackward(LSTMBackward):
    """With forward-mode derivatives, as torch.func.hessian asks for."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        LSTMBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grads, _, _, operands = _split(tangents[2:])
        return tuple(_of_backward(ctx, ctx.needs).push_forward(grads, operands))
