"""Inference on the CPU in one native call, where nothing is asked for that needs more.

A small call takes longer on its way to the kernels than in them. The operator behind this module
checks, allocates and computes in one, and gives nothing for what is not its part: another device,
or a mistake. All such calls take the way through checks.py, dispatch.py and autograd.py, which has
the messages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules.rnn import RNNBase

from ..stack import State
from .autograd import requires_grad

__all__ = ["alone", "infer", "infer_packed"]

_infer: Any = torch.ops.fastlstm._infer.default
infer_packed: Any = torch.ops.fastlstm._infer_packed.default
"""The same of weights that were packed: three tensors, or three times None."""

# They have no gradient, and are called only where none is wanted.
_library = torch.library.Library("fastlstm", "FRAGMENT")
for _name in ("_infer", "_infer_packed", "_forward_packed"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def infer(lstm: RNNBase, input: Tensor, hx: Any) -> tuple[Tensor, State] | None:
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
    if torch.is_grad_enabled() and requires_grad(input, h0, c0, *weights):
        return None
    sizes = [
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        bool(lstm.bias),  # RNNBase takes any truth value
        lstm.proj_size,
        bool(lstm.bidirectional),
        bool(lstm.batch_first),
    ]
    output, h_n, c_n = _infer(input, h0, c0, weights, sizes)
    return None if output is None else (output, (h_n, c_n))


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
