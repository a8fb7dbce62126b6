"""The native operators under autograd: first derivatives, double backward, forward mode.

``lstm`` is the one entry: same signature, shapes and semantics as ``reference.lstm``, which is its
oracle. Nothing here checks user input; that is ``functional.lstm``'s part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..stack import PLAIN, Call, Stack
from . import algorithm, higher_order, native
from .native import Scalars
from .vmap import Rule, forward_rule, one_by_one

__all__ = [
    "LSTMBackward",
    "LSTMFunction",
    "derivative_in_force",
    "forward_and_saved",
    "lstm",
    "requires_grad",
]

_forward: Any = torch.ops.fastlstm.forward.default
_backward: Any = torch.ops.fastlstm.backward.default


def lstm(
    input: Tensor,
    state: tuple[Tensor | None, Tensor | None] | None,
    weights: Sequence[Tensor],
    stack: Stack,
    call: Call = PLAIN,
) -> tuple[Tensor, ...]:
    """The whole stack in one native call. Arguments and results are those of ``reference.lstm``.

    Raises:
        RuntimeError: a shape or dtype that the operator cannot read; ``functional.lstm`` gives
            the messages meant for users.
    """
    h0, c0 = state or (None, None)
    dropout, seed, batch_sizes, return_cells = call
    settings = algorithm.settings() if weights[0].is_cuda else (False, 0)
    scalars = native.scalars_of(stack, dropout, settings)
    wants_gradient = torch.is_grad_enabled() and requires_grad(input, h0, c0, *weights)
    in_dynamo = torch.compiler.is_dynamo_compiling()
    if in_dynamo and _leaves_graph(wants_gradient):
        return torch._dynamo.disable(lstm)(input, state, weights, stack, call)
    if in_dynamo or not _jvp_may_come():  # Dynamo cannot trace a function with a jvp
        arguments = (input, h0, c0, weights, batch_sizes, seed, *scalars)
        if torch.jit.is_tracing() and not return_cells:
            # A trace records operators, not Python functions. It must save for backward: it may
            # be made without gradients and then be differentiated.
            results = torch.ops.fastlstm.forward(*arguments, True)
        elif wants_gradient:
            results = LSTMFunction.apply(
                input, h0, c0, batch_sizes, seed, scalars, return_cells, *weights
            )
        else:
            results = native.call(_forward, *arguments, return_cells)
    elif _transforms().count(torch._C._functorch.TransformType.Jvp) <= 1:
        results = _DualLSTMFunction.apply(
            input, h0, c0, batch_sizes, seed, scalars, return_cells, *weights
        )
    else:
        # torch does not differentiate a function's jvp in forward mode: the tensors saved for it
        # have lost the tangents of the other levels.
        return reference.lstm(input, state, weights, stack, call)
    return (*results[:3], results[5]) if return_cells else tuple(results[:3])


def forward_and_saved(
    input: Tensor, state: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor], stack: Stack
) -> tuple[Tensor, ...]:
    """All that the forward operator gives, without a gradient.

    Returns:
        ``output, h_n, c_n`` as of :func:`lstm`; ``hidden`` ``(L-1, R, D*P)``, the outputs of the
        layers below the last; ``gates`` ``(L*D, R, 4H)``, activated (with layer_norm 12H, in the
        order of csrc/lstm.h); ``cells`` ``(L*D, R, H)``, the cell states of every step.
    """
    h0, c0 = state or (None, None)
    scalars = native.scalars_of(stack, 0.0)
    arguments = (input, h0, c0, weights, None, None, *scalars, True)
    with torch.no_grad():
        return native.call(_forward, *arguments)


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd wants a gradient of one of these."""
    return any(x is not None and x.requires_grad for x in tensors)


class LSTMFunction(torch.autograd.Function):
    """The stack with its gradient: ``output, h_n, c_n`` and what is saved for backward.

    The last of the saved tensors holds every step's c. It has a gradient with ``return_cells``.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        # One parameter, for torch inspects them all in every call, a microsecond or two each.
        input, h0, c0, batch_sizes, seed, scalars, _, *weights = arguments
        return native.call(
            _forward,
            *(input, h0, c0, weights, batch_sizes, seed, *scalars, True),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        input, h0, c0, batch_sizes, seed, ctx.scalars, ctx.return_cells, *weights = inputs
        y, _, _, hidden, gates, cells = output
        ctx.mark_non_differentiable(hidden, gates, *() if ctx.return_cells else (cells,))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, seed, y, hidden, gates, cells, input, h0, c0, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[7:]]
        arriving = (*grads[:3], grads[5])
        if all(grad is None for grad in arriving):
            return (None,) * len(ctx.needs_input_grad)
        # With create_graph=True grad mode is on here, and the operator records its own gradient.
        if not torch.compiler.is_dynamo_compiling() and _jvp_may_come():
            results = _DualLSTMBackward.apply(ctx.scalars, needs, *arriving, *ctx.saved_tensors)
        else:
            results = LSTMBackward.forward(ctx.scalars, needs, *arriving, *ctx.saved_tensors)
        needed = [grad if need else None for grad, need in zip(results, needs, strict=True)]
        return (*needed[:3], None, None, None, None, *needed[3:])

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> Rule:
        def call(*operator_arguments: Any) -> tuple[Tensor, ...]:
            input, h0, c0, weights, batch_sizes, seed, scalars, return_cells = operator_arguments
            return cls.apply(input, h0, c0, batch_sizes, seed, scalars, return_cells, *weights)

        def in_operator_order(x: tuple) -> tuple:
            return (*x[:3], list(x[7:]), *x[3:7])

        arguments = in_operator_order(in_dims), in_operator_order(args)
        return forward_rule(call, info.batch_size, *arguments)


def _transforms() -> list[Any]:
    """torch.func's transforms that are in force, the outermost first."""
    return [x.key() for x in torch._C._functorch.get_interpreter_stack() or []]


@native.constant_in_compiled
def derivative_in_force() -> bool:
    """Whether one of torch.func's derivatives is computed, or there is a dual level."""
    derivatives = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return forward_ad._current_level >= 0 or any(x in derivatives for x in _transforms())


@native.constant_in_compiled
def _leaves_graph(wants_gradient: bool) -> bool:
    """Whether Dynamo has to call the stack and not to trace it, for the derivatives to be right.

    Dynamo sees the first derivative that autograd wants and no other. Under torch.func's transforms
    and inside a dual level it is right in inference alone, where vmap joins the samples.
    """
    return derivative_in_force() or (wants_gradient and bool(_transforms()))


def _jvp_may_come() -> bool:
    """Whether a JVP may be asked for: inside a dual level, or inside any torch.func transform."""
    return forward_ad._current_level >= 0 or bool(_transforms())


class _DualLSTMFunction(LSTMFunction):
    """With a JVP, computed from the reference by differentiating its VJP."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        LSTMFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*_tensors(inputs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        batch_sizes, seed, *operands = ctx.saved_tensors
        *first, cells = higher_order.push_forward(
            operands, _tensors(tangents)[2:], batch_sizes, seed, ctx.scalars
        )
        return (*first, None, None, cells if ctx.return_cells else None)


def _tensors(arguments: Sequence[Any]) -> list[Any]:
    """LSTMFunction's tensors: batch sizes and seed, then the operands."""
    input, h0, c0, batch_sizes, seed, _, _, *weights = arguments
    return [batch_sizes, seed, input, h0, c0, *weights]


def _split(tensors: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """LSTMBackward's tensors: gradients; batch sizes and seed; saved ones; operands."""
    return tensors[:4], tensors[4:6], tensors[6:10], tensors[10:]


class LSTMBackward(torch.autograd.Function):
    """The native backward; its own gradient differentiates the reference."""

    @staticmethod
    def forward(scalars: Scalars, needs: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
        grads, (batch_sizes, seed), saved, operands = _split(tensors)
        input, h0, c0, *weights = operands
        grad_input, grad_h0, grad_c0, grad_weights = native.call(
            _backward,
            *(*grads, input, h0, c0, weights, batch_sizes, seed, *saved, *scalars, needs),
        )
        return (grad_input, grad_h0, grad_c0, *grad_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.scalars, ctx.needs, *tensors = inputs
        grads, (batch_sizes, seed), _, operands = _split(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, seed, *grads, *operands)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [grad is not None for grad in grad_grads]
        if not any(wanted):
            return (None,) * (6 + len(ctx.saved_tensors))
        wanted = [a and b for a, b in zip(wanted, ctx.needs, strict=True)]
        to_grads, to_operands = _backward_function(ctx, wanted).vjp(grad_grads)
        return (None, None, *to_grads, *(None,) * 6, *to_operands)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> Rule:
        return one_by_one(cls.apply, info.batch_size, in_dims, args)


def _backward_function(ctx: Any, wanted: Sequence[bool]) -> higher_order.BackwardFunction:
    batch_sizes, seed, *tensors = ctx.saved_tensors
    run = higher_order.equations_of(batch_sizes, seed, ctx.scalars)
    return higher_order.BackwardFunction(run, tensors[:4], tensors[4:], wanted)


class _DualLSTMBackward(LSTMBackward):
    """With a JVP, which torch.func.hessian needs."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        LSTMBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grads, _, _, operands = _split(tangents[2:])
        return tuple(_backward_function(ctx, ctx.needs).jvp(grads, operands))
