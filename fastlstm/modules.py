"""``LSTM`` and ``LSTMCell``: torch's modules by every name and shape, on the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from . import functional
from .checks import check_options, check_probability
from .naming import shown_name
from .ops import autograd
from .ops.plain import run_plain
from .stack import NORMS, Call, Stack, State

__all__ = ["LSTM", "LSTMCell", "extra_options", "stack_of"]


def extra_options(module: RNNBase) -> dict[str, Any]:
    """The options in use that ``nn.LSTM`` lacks, by name."""
    names = module._extra_options if isinstance(module, LSTM) else ()
    return {name: getattr(module, name) for name in names}


def stack_of(module: RNNBase) -> Stack:
    """What describes the stack of an LSTM, ours or torch's, at this moment."""
    stack = Stack(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        bool(module.bias),
        module.proj_size,
        bool(module.bidirectional),  # RNNBase takes any truth value
    )
    extra = extra_options(module)
    if not extra:
        return stack
    return stack._replace(
        recurrent_dropout=extra.get("recurrent_dropout") or 0.0,
        zoneout_h=extra.get("zoneout_h") or 0.0,
        zoneout_c=extra.get("zoneout_c") or 0.0,
        cell_clip=extra.get("cell_clip") or 0.0,
        layer_norm=bool(extra.get("layer_norm")),
    )


def _check_extra(stack: Stack, options: dict[str, Any]) -> None:
    """Check the options that ``nn.LSTM`` lacks: a stack's, and those by name that were given."""
    check_probability("weight_dropout", options.get("weight_dropout", 0.0))
    every = options.get("checkpoint_every")
    if every is not None and (type(every) is not int or every < 1):
        raise ValueError(f"checkpoint_every should be a number of steps or None, got {every}")
    if every is not None and stack.bidirectional:
        raise ValueError("checkpoint_every: expected bidirectional=False")
    check_options(stack, options.get("cell_clip"))


class _StackAttribute:
    """``LSTM.stack``, which gives way to whatever a subclass calls by that name."""

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        if any("stack" in x for x in (module._parameters, module._buffers, module._modules)):
            raise AttributeError("stack")  # nn.Module then finds it there
        return stack_of(module)


class LSTM(RNNBase):
    r"""A drop-in replacement for :class:`torch.nn.LSTM`, with indices as a further form of input.

    Arguments, parameters (names, shapes, initialisation), inputs, outputs, errors and warnings
    are those of ``nn.LSTM``; ``state_dict`` goes both ways. It is no subclass of ``nn.LSTM``,
    on which ``torch.compile`` gives up, but of ``nn.modules.rnn.RNNBase``. For
    ``torch.jit.script``, which does not read it, convert with :func:`fastlstm.to_torch`.

    Where there are no kernels for the parameters' device or dtype, torch's own LSTM runs on them,
    after one warning.

    Args:
        input_size: number of features of the input, I.
        hidden_size: number of units, H.
        num_layers: number of stacked layers, L.
        bias: whether the cells have biases.
        batch_first: whether batched input and output are ``(B, T, ...)`` and not ``(T, B, ...)``.
        dropout: probability of dropping an element between layers in training. Seeded by
            ``torch.manual_seed``; the elements dropped are others than ``nn.LSTM``'s.
        bidirectional: whether a second direction reads the sequence backwards; D = 2, else 1.
        proj_size: size of the projected hidden state, smaller than H; 0 for none. P = proj_size
            or H.
        device, dtype: of the parameters.
        weight_dropout: probability of dropping an element of every ``weight_hh`` in training,
            once for a whole call: DropConnect (Wan et al., 2013) as in AWD-LSTM (Merity et al.,
            2017).
        checkpoint_every: hold for backward only the states at every so many steps, and compute
            what lies between again: memory of a few segments for the time of one more forward
            pass (Chen et al., 2016). One direction, padded input. Inside torch.func's derivatives
            and dual levels nothing is computed again.
        recurrent_dropout: probability of dropping an element of the candidate g, drawn anew in
            every step of training, so that c itself is never dropped (Semeniuta, Severyn and
            Barth, 2016).
        zoneout_h, zoneout_c: probability that an element of h or c keeps its value in a step of
            training; in evaluation that share of the old value is kept (Krueger et al., 2017).
            Without proj_size.
        cell_clip: bound on the magnitude of every new c, before its tanh; None for none.
        layer_norm: normalise the gates' two products, and c on its way to h (Ba, Kiros and Hinton,
            2016). Adds the parameters ``norm_ih_l0`` and ``norm_hh_l0`` (4H, gains, 1 at first),
            ``norm_c_l0`` and ``norm_c_bias_l0`` (H) of every layer and direction. Without
            proj_size.

    Inputs: ``input, hx``
        * **input**: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)`` without a
          batch, of the parameters' dtype; or int64/int32 indices of shape ``(T, B)``, ``(B, T)``
          with ``batch_first``, or ``(T,)``, each below I, which mean the one-hot rows of width I
          without building them; or a ``PackedSequence`` of either.
        * **hx**: ``(h_0, c_0)`` of shapes ``(L*D, B, P)`` and ``(L*D, B, H)``, without B where
          input has none. Default: zeros.
        * **lengths** (by keyword): ``(B,)`` whole numbers from 1 to T, in any order, where padded
          sequences end. Results are those of packing and padding again: output is zero beyond a
          sequence's end, states are those after its last step. Default: all are T.
        * **return_cells** (by keyword): whether to return the cell states of every step too.

    Outputs: ``output, (h_n, c_n)``
        * **output**: ``(T, B, D*P)``, ``(B, T, D*P)``, ``(T, D*P)`` or a ``PackedSequence``.
        * **h_n, c_n**: shaped like h_0 and c_0.
        * **cells**, with ``return_cells``: ``(L*D, T, B, H)``, ``(L*D, B, T, H)`` with
          ``batch_first`` or ``(L*D, T, H)``; for packed input a ``PackedSequence`` of
          ``(R, L*D, H)``.

    Raises, when constructed:
        * **TypeError, ValueError**: as ``nn.LSTM``; ValueError also for a further option that is
          out of range, or stands beside one that it excludes.

    Raises, when called:
        * **ValueError**: an input of the wrong number of dimensions or dtype; wrong lengths;
          ``return_cells`` or ``lengths`` beside ``checkpoint_every``.
        * **RuntimeError**: wrong sizes, states of another dtype or device, an empty sequence.
        * **IndexError**: an index outside ``0 .. I-1`` (on the CPU, in eager mode).
        * **TypeError**: hx of batched input is no tuple; lengths are no whole numbers.
        * **NotImplementedError**: an option that ``nn.LSTM`` lacks where there are no kernels, or
          beside lengths on a GPU.

    Examples::

        >>> lstm = fastlstm.LSTM(10, 20, 2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output, (h_n, c_n) = lstm(torch.randint(10, (5, 3)), (h_n, c_n))
    """

    stack: Stack = cast(Stack, _StackAttribute())
    """Sizes and options, as a :class:`fastlstm.stack.Stack`."""

    # Names of the options in use that nn.LSTM lacks. Their values are attributes of the instance;
    # on the class they would hide what a subclass calls by the same name (a module `layer_norm`).
    _extra_options: tuple[str, ...] = ()

    def __init__(  # nn.LSTM's arguments in their order, and ours by name
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_dropout: float = 0.0,
        checkpoint_every: int | None = None,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        cell_clip: float | None = None,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        options: dict[str, Any] = {
            "weight_dropout": weight_dropout,
            "checkpoint_every": checkpoint_every,
            "recurrent_dropout": recurrent_dropout,
            "zoneout_h": zoneout_h,
            "zoneout_c": zoneout_c,
            "cell_clip": cell_clip,
            "layer_norm": bool(layer_norm),
        }
        used = {name: value for name, value in options.items() if value}
        if used:  # a plain module's state is nn.LSTM's
            self._extra_options = tuple(used)
            self.__dict__.update(used)
        _check_extra(stack_of(self), options)
        if layer_norm:
            self._add_norms(device, dtype)

    def _add_norms(self, device: Any, dtype: Any) -> None:
        names = []
        for cell_names in self._all_weights:
            suffix = cell_names[0].removeprefix("weight_ih")
            for norm in NORMS:
                size = self.hidden_size * (1 if norm.startswith("norm_c") else 4)
                weight = torch.empty(size, device=device, dtype=dtype)
                cell_names.append(norm + suffix)
                self.register_parameter(cell_names[-1], nn.Parameter(weight))
            names += cell_names
        for name in names:  # parameters() has them cell by cell
            self._parameters[name] = self._parameters.pop(name)
        self._flat_weights_names = names
        self._init_flat_weights()
        self._reset_norms()

    def _reset_norms(self) -> None:
        for name in self._flat_weights_names:
            if name.startswith("norm_c_bias"):
                nn.init.zeros_(getattr(self, name))
            elif name.startswith("norm_"):
                nn.init.ones_(getattr(self, name))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self._option("layer_norm"):
            self._reset_norms()

    def flatten_parameters(self) -> None:
        """As ``nn.LSTM``'s: on CUDA one buffer of all weights, as cuDNN likes them.

        The kernels of this package take the weights as they are. Layer-normalised stacks, whose
        gains cuDNN does not know, stay as they are.
        """
        if not self._option("layer_norm"):
            super().flatten_parameters()

    def _option(self, name: str, default: Any = None) -> Any:
        """What nn.LSTM lacks: its value, where the module was made with it."""
        return getattr(self, name) if name in self._extra_options else default

    def _get_name(self) -> str:
        return shown_name(self, LSTM)

    def extra_repr(self) -> str:
        words = [f"{name}={value}" for name, value in extra_options(self).items()]
        return ", ".join([super().extra_repr(), *words])

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_cells: Literal[True],
    ) -> tuple[Tensor, State, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        return_cells: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        return_cells: Literal[True],
    ) -> tuple[PackedSequence, State, PackedSequence]: ...

    def forward(self, input, hx=None, *, lengths=None, return_cells=False):
        """Run the stack: inputs, outputs and errors are the class's."""
        if isinstance(input, Proxy):
            return _node(self, input, hx, lengths=lengths, return_cells=return_cells)
        packed = isinstance(input, PackedSequence)
        if not (packed or return_cells or self._extra_options) and lengths is None:
            results = run_plain(self, input, hx)
            if results is not None:
                return results
        stack = stack_of(self)
        if self._extra_options and not torch.compiler.is_compiling():
            _check_extra(stack, extra_options(self))  # they may have changed since
        checkpoint_every = self._option("checkpoint_every")
        if return_cells and checkpoint_every is not None:
            raise ValueError("return_cells: expected checkpoint_every=None")
        if checkpoint_every is not None and (packed or lengths is not None):
            raise ValueError("checkpoint_every: expected padded input without lengths")
        if packed and lengths is not None:
            raise ValueError("lengths: a PackedSequence has its own, expected None")
        if (
            checkpoint_every is not None
            and torch.is_grad_enabled()
            and not autograd.derivative_in_force()  # which forbids what checkpoint is made of
        ):
            return self._forward_in_segments(input, hx, self._current_weights())
        rows, hx = self._sorted(input, hx) if packed else (input, hx)
        call = Call(self.dropout, None, input.batch_sizes if packed else None, return_cells)
        # The rows of a PackedSequence have no batch dimension that could come first.
        batch_first = self.batch_first and not packed
        output, state, *cells = functional.run(
            rows,
            hx,
            self._current_weights(),
            stack,
            call,
            self.training,
            batch_first,
            lengths,
        )
        if not packed:
            return output, state, *cells
        output = PackedSequence(output, *input[1:])
        cells = [PackedSequence(x.movedim(0, 1), *input[1:]) for x in cells]
        return output, self.permute_hidden(state, input.unsorted_indices), *cells

    def _forward_in_segments(
        self, input: Tensor, hx: State | None, weights: list[Tensor]
    ) -> tuple[Tensor, State]:
        """Backward calls every segment again, from the state that the one before left."""
        index = not input.is_floating_point()
        batched = input.dim() + index == 3
        time = 1 if self.batch_first and batched else 0
        # Read here: a number that Dynamo first meets inside a checkpoint is unknown to the next.
        how = stack_of(self), Call(float(self.dropout)), self.training, self.batch_first
        outputs = []
        for segment in input.split(self._option("checkpoint_every"), min(time, input.dim() - 1)):
            output, hx = checkpoint(functional.run, segment, hx, weights, *how, use_reentrant=False)
            outputs.append(output)
        return torch.cat(outputs, time), cast(State, hx)

    def _sorted(self, input: PackedSequence, hx: State | None) -> tuple[Tensor, State | None]:
        """The rows of packed input, and the state in the order of its sequences."""
        if hx is not None and input.sorted_indices is not None:
            # Sorting would make a state of too many sequences fit, so look before.
            if hx[0].dim() == hx[1].dim() == 3:
                self._check_state_sizes(hx, input.sorted_indices.shape[0])
            hx = self.permute_hidden(hx, input.sorted_indices)
        return input.data, hx

    def _current_weights(self) -> list[Tensor]:
        """The weights as they are by name at this moment, not as ``_flat_weights`` caches them.

        So whatever replaced one is seen: functional_call, a parametrization, weight dropout. The
        parameters themselves are read past ``Module.__getattr__``, which costs a microsecond each.
        """
        parameters: dict[str, Any] = self._parameters
        weights = [
            parameters[n] if n in parameters else getattr(self, n) for n in self._flat_weights_names
        ]
        weight_dropout = self._option("weight_dropout", 0.0)
        if weight_dropout == 0 or not self.training:
            return weights
        return [
            F.dropout(w, weight_dropout) if n.startswith("weight_hh") else w
            for n, w in zip(self._flat_weights_names, weights, strict=True)
        ]

    # What nn.LSTM has beside forward, for subclasses and callers that use it.

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        cells, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return cells, batch, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: State, batch_sizes: Tensor | None
    ) -> None:
        self.check_input(input, batch_sizes)
        self._check_state_sizes(hidden, self.get_expected_hidden_size(input, batch_sizes)[1])

    def _check_state_sizes(self, hidden: State, batch: int) -> None:
        stack = stack_of(self)
        for i, width in enumerate((stack.out_size, stack.hidden_size)):
            self.check_hidden_size(
                hidden[i],
                (stack.pseudo_layers, batch, width),
                f"Expected hidden[{i}] size {{}}, got {{}}",
            )

    def permute_hidden(  # type: ignore[override]
        self, hx: State, permutation: Tensor | None
    ) -> State:
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)


class LSTMCell(RNNCellBase):
    r"""A drop-in replacement for :class:`torch.nn.LSTMCell`: one step of one layer.

    Args:
        input_size: number of features of the input, I.
        hidden_size: number of units, H.
        bias: whether the cell has biases.
        device, dtype: of the parameters.

    Inputs: ``input, hx``
        * **input**: ``(B, I)`` or ``(I,)`` of the parameters' dtype, or int64/int32 indices of
          shape ``(B,)`` or ``()`` that mean one-hot rows of width I.
        * **hx**: ``(h, c)``, each ``(B, H)``, or ``(H,)`` where input has no batch. Default: zeros.

    Outputs: the new ``(h, c)``.

    Raises, when called:
        * **ValueError**: an input or state of the wrong number of dimensions.
        * **RuntimeError**: wrong sizes, dtypes or devices.
        * **IndexError**: an index outside ``0 .. I-1`` (on the CPU, in eager mode).
        * **TypeError**: hx of batched input is no tuple.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def _get_name(self) -> str:
        return shown_name(self, LSTMCell)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Take a step: inputs, outputs and errors are the class's."""
        if isinstance(input, Proxy):
            return _node(self, input, hx)
        return functional.lstm_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        )


def _node(module: nn.Module, input: Proxy, hx: Any, **options: Any) -> Proxy:
    """For ``torch.fx``: the one node that calls the module. Options that are off are left out.

    torch.fx enters every module whose class lies outside ``torch.nn``, and there meets control flow
    that depends on the input.
    """
    tracer: Any = input.tracer
    arguments = (input,) if hx is None else (input, hx)
    used = {name: x for name, x in options.items() if x is not None and x is not False}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, used)
