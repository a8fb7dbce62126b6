"""``FrozenLSTM``: a layer's inference on the CPU with weights that were packed once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, cast, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import functional
from .checks import check_devices, check_state_sizes, check_weights
from .modules import stack_of
from .ops import native, plain
from .ops.autograd import requires_grad
from .stack import PLAIN, Call, Stack, State

__all__ = ["FrozenLSTM"]


class _Weights:
    """Packed weights in the native module, freed with this object."""

    def __init__(self, weights: Sequence[Tensor], stack: Stack) -> None:
        rules = (stack.zoneout_h, stack.zoneout_c, stack.cell_clip, stack.layer_norm)
        self.handle: int = native.call(torch.ops.fastlstm._pack, weights, *stack[1:6], *rules)
        weakref.finalize(self, native._C.free_packed, self.handle)

    def __deepcopy__(self, memo: dict) -> _Weights:
        return self  # nothing ever writes them

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "packed weights cannot be pickled: they are laid out for this processor. "
            "Save the LSTM that they came from, and prepack it where it is loaded."
        )


class FrozenLSTM(nn.Module):
    """An LSTM's inference on the CPU, its weights copied and packed: see :func:`fastlstm.prepack`.

    Called as the LSTM that it was made of, with the same inputs, outputs and errors, but for
    ``return_cells``; under autocast in its own dtype. It computes what the LSTM would in
    evaluation. It has no parameters: later changes of the LSTM's do not reach it, nor is there a
    gradient.

    Inputs: ``input, hx``, and ``lengths`` by keyword
        as of :class:`fastlstm.LSTM`, on the CPU; no tensor that requires a gradient, unless
        gradients are disabled.

    Raises, when called:
        * **RuntimeError**: an input or a state that requires a gradient.
        * **NotImplementedError**: lengths under a ``torch.func`` transform.
        * **ValueError, RuntimeError, IndexError, TypeError**: as :class:`fastlstm.LSTM`.

    Attributes:
        stack: sizes and options.
        batch_first: whether batched input and output have their batch first.
        dtype: of weights, input, states and results.
    """

    def __init__(self, lstm: RNNBase) -> None:
        super().__init__()
        if not isinstance(lstm, RNNBase) or lstm.mode != "LSTM":
            raise TypeError(f"lstm must be a fastlstm.LSTM or an nn.LSTM, got {_kind(lstm)}")
        # By name at this moment, as fastlstm.LSTM reads them. recurrent_dropout is of training.
        weights = [getattr(lstm, name).detach() for name in lstm._flat_weights_names]
        self.stack = stack_of(lstm)._replace(recurrent_dropout=0.0)
        self.batch_first = bool(lstm.batch_first)
        self.dtype: torch.dtype = weights[0].dtype
        if weights[0].device.type != "cpu":
            raise RuntimeError(
                f"lstm must be on the CPU for its weights to be packed, got {weights[0].device}; "
                "without a decoder there is nothing to pack for other devices"
            )
        if missing := native.kernels_missing(weights[0]):
            raise RuntimeError(f"lstm's weights cannot be packed: {missing}")
        check_devices(weights[0], (), weights)
        check_weights(weights, self.stack)
        self._weights = _Weights(weights, self.stack)
        # Their shapes and dtype for the checks of a call, in one element of memory.
        zero = torch.zeros((), dtype=self.dtype, device="cpu")
        self._shapes = tuple(zero.expand(shape) for shape in self.stack.weight_shapes())
        # What the operator's fake tensors are made from.
        self._sizes = [
            *(self.stack.pseudo_layers, self.stack.directions),
            *(self.stack.out_size, self.stack.hidden_size, native.DTYPES.index(self.dtype)),
        ]

    def extra_repr(self) -> str:
        defaults = Stack(0, 0)._asdict()
        options = {k: v for k, v in self.stack._asdict().items() if v != defaults[k]}
        sizes = [str(options.pop("input_size")), str(options.pop("hidden_size"))]
        if self.batch_first:
            options["batch_first"] = True
        return ", ".join([*sizes, *(f"{k}={v}" for k, v in options.items()), f"{self.dtype}"])

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, State]: ...

    def forward(self, input, hx=None, *, lengths=None):
        """Run the stack: inputs, outputs and errors are the class's."""
        packed = isinstance(input, PackedSequence)
        if not packed and lengths is None and plain.alone(input, hx):
            h0, c0 = hx or (None, None)
            _refuse_gradients(input, hx)
            handle = self._weights.handle
            output, *state = plain.infer_packed(input, h0, c0, handle, self.batch_first)
            if output is not None:
                return output, tuple(state)
        if not packed:
            return self._run(input, hx, PLAIN, self.batch_first, lengths)
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence has its own, expected None")
        rows, batch_sizes, order, back = input
        if hx is not None and order is not None:
            # Sorting would make a state of too many sequences fit, so look before.
            if hx[0].dim() == hx[1].dim() == 3:
                check_state_sizes(hx[0], hx[1], self.stack, order.shape[0])
            hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
        output, state = self._run(rows, hx, Call(batch_sizes=batch_sizes), False, None)
        if back is not None:
            state = (state[0].index_select(1, back), state[1].index_select(1, back))
        return PackedSequence(output, batch_sizes, order, back), state

    def _run(
        self, input: Tensor, hx: State | None, call: Call, batch_first: bool, lengths: Any
    ) -> tuple[Tensor, State]:
        """The way of the calls that one native call does not take: with all checks."""
        if torch.is_autocast_enabled("cpu"):
            input, lowered, _ = functional.cast_all(input, hx, (), self.dtype)
            hx = cast("State | None", lowered)
        results = functional.run_cast(
            input, hx, self._shapes, self.stack, call, False, batch_first, lengths,
            run_stack=self._run_stack,
        )  # fmt: skip
        return cast("tuple[Tensor, State]", results)

    def _run_stack(
        self,
        input: Tensor,
        state: State | None,
        weights: Sequence[Tensor],
        stack: Stack,
        call: Call,
        draws: bool,
    ) -> tuple[Tensor, ...]:
        """In place of ``dispatch.run_stack``: ``weights`` are shapes alone."""
        _refuse_gradients(input, state)
        h0, c0 = state or (None, None)
        operator = torch.ops.fastlstm._forward_packed
        results: tuple[Tensor, ...] = native.call(
            operator, input, h0, c0, call.batch_sizes, self._weights.handle, self._sizes
        )
        return results


def _refuse_gradients(input: Tensor, hx: Sequence[Tensor] | None) -> None:
    dual = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if not (dual or torch.is_grad_enabled()):
        return
    for name, tensors in (("input", (input,)), ("hx", hx or ())):
        if (torch.is_grad_enabled() and requires_grad(*tensors)) or (
            dual and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
        ):
            raise RuntimeError(
                f"{name} requires a gradient, which packed weights do not have: call the LSTM "
                "itself, or this under torch.no_grad()"
            )


def _kind(x: Any) -> str:
    return type(x).__name__
