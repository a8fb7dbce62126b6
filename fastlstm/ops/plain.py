"""Plain calls of a module on the CPU: the short way to the kernels, past the checks in Python.

A small call takes longer on its way to the kernels than in them. The operators check what they are
given too, but in other words than ``nn.LSTM``'s, and not everything. So what the short way does not
serve, be it a mistake, takes the usual way: checks.py, dispatch.py and autograd.py.

Without gradients one native call checks, allocates and computes. It gives nothing where it cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules.rnn import RNNBase

from ..stack import INDEX_TYPES, State
from .autograd import LSTMFunction, requires_grad

__all__ = ["alone", "infer_packed", "run_plain"]

_infer: Any = torch.ops.fastlstm._infer.default
infer_packed: Any = torch.ops.fastlstm._infer_packed.default
"""The same of weights that were packed: three tensors, or three times None."""

# They have no gradient, and are called only where none is wanted.
_library = torch.library.Library("fastlstm", "FRAGMENT")
for _name in ("_infer", "_infer_packed", "_forward_packed"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

# Function.apply without what it does first: it looks at the signature of ``forward`` in every call,
# and at torch.func's transforms, of which there are none here.
_apply: Any = super(torch.autograd.Function, LSTMFunction).apply

# Of a plain stack, behind its dropout: recurrent_dropout, zoneout_h, zoneout_c, cell_clip,
# layer_norm, allow_tf32 and algorithm.
_NO_OPTIONS = (0.0, 0.0, 0.0, 0.0, False, False, 0)


def run_plain(lstm: RNNBase, input: Tensor, hx: Any) -> tuple[Tensor, State] | None:
    """What a plain module returns for padded input; None where it has to take the usual way."""
    if not alone(input, hx) or not 0 <= lstm.dropout <= (0 if lstm.training else 1):
        return None
    h0, c0 = hx or (None, None)
    weights: list[Tensor] = []
    parameters: dict[str, Any] = lstm._parameters
    for name in lstm._flat_weights_names:
        weight = parameters.get(name)
        if type(weight) is not Parameter:  # a parametrization, or functional_call's
            return None
        weights.append(weight)
    sizes = [
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        bool(lstm.bias),  # RNNBase takes any truth value
        lstm.proj_size,
        bool(lstm.bidirectional),
        bool(lstm.batch_first),
    ]
    if torch.is_grad_enabled() and requires_grad(input, h0, c0, *weights):
        return _train(input, h0, c0, weights, sizes)
    output, h_n, c_n = _infer(input, h0, c0, weights, sizes)
    return None if output is None else (output, (h_n, c_n))


def _train(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], sizes: list[Any]
) -> tuple[Tensor, State] | None:
    """As the native call, but with a gradient. Batched input alone."""
    *stack, batch_first = sizes
    if input.dim() != (2 if input.dtype in INDEX_TYPES else 3):
        return None
    if batch_first:
        input = input.transpose(0, 1)
    # What checks.py looks at and the operator does not.
    if not input.shape[0] or weights[0].dim() != 2 or weights[0].shape[1] != stack[0]:
        return None
    for x in (h0, c0, *weights):
        if x is not None and not x.is_cpu:
            return None
    try:
        output, h_n, c_n, *_ = _apply(
            input, h0, c0, None, None, (*stack[1:], 0.0, *_NO_OPTIONS), False, *weights
        )
    except RuntimeError:
        return None
    return output.transpose(0, 1) if batch_first else output, (h_n, c_n)


def alone(input: Tensor, hx: Any) -> bool:
    """Whether these are plain tensors on the CPU, and nothing but the kernels has to see the call.

    That would be a mode, a transform, a tracer or autocast.
    """
    if torch.compiler.is_compiling() or type(input) is not Tensor or not input.is_cpu:
        return False
    if hx is not None:
        if type(hx) not in (tuple, list) or len(hx) != 2:
            return False
        if type(hx[0]) is not Tensor or type(hx[1]) is not Tensor:
            return False
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )
