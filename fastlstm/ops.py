"""The native operators as torch sees them: autograd, fake kernels, double backward.

``lstm`` is the one entry: same signature, shapes and semantics as ``reference.lstm``, which is its
oracle. Nothing here checks user input; that is ``functional.lstm``'s part.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "fastlstm's native module is missing or cannot be loaded "
        f"({error}); build it with `pip install .` in the source folder"
    ) from error

from . import algorithms, transforms

__all__ = ["LSTMFunction", "has_cuda", "image_missing", "lstm"]

_INDEX_TYPES = (torch.int32, torch.int64)

if (_asked := os.environ.get("FASTLSTM_CPU_ISA")) and _asked != _C.cpu_selected():
    raise ImportError(
        f"FASTLSTM_CPU_ISA={_asked!r}: expected one of {', '.join(_C.cpu_supported())} "
        "on this processor"
    )


# Registers the operators' CUDA side. Beside a torch without CUDA a module that was built for one
# cannot be loaded, and nobody misses it.
_C_cuda: Any = None
if torch.version.cuda is not None:
    try:
        _C_cuda = importlib.import_module("fastlstm._C_cuda")
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        warnings.warn(f"fastlstm's CUDA kernels cannot be loaded: {error}", stacklevel=2)


def has_cuda() -> bool:
    """Whether the CUDA kernels were built and can be loaded."""
    return _C_cuda is not None


def _runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether kernels built for these (as TORCH_CUDA_ARCH_LIST names them) run on such a GPU.

    An image runs on its own major version from its minor version on, one of ``9.0a`` on 9.0 alone,
    PTX on everything newer.
    """
    for name in re.split(r"[;,\s]+", architectures):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            continue
        built = (int(found[1]), int(found[2]))
        if found[3] == "a":
            if capability == built:
                return True
        elif capability >= built and (capability[0] == built[0] or (found[4] and not found[3])):
            return True
    return False


@functools.cache
def _image_missing(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if _C_cuda is None or _runs_on(capability, _C_cuda.architectures):
        return None
    return (
        f"the CUDA kernels were built for {_C_cuda.architectures}, "
        f"not for a GPU of compute capability {capability[0]}.{capability[1]}"
    )


@algorithms.constant_in_compiled
def image_missing(device: int) -> str | None:
    """Why the CUDA kernels cannot run on the GPU of this number; None where they can."""
    return _image_missing(device)


class Options(NamedTuple):
    """The operators' plain arguments, in the order of their schemas."""

    hidden_size: int
    num_layers: int = 1
    has_bias: bool = True
    proj_size: int = 0
    bidirectional: bool = False
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    cell_clip: float = 0.0
    layer_norm: bool = False
    allow_tf32: bool = False  # float32 on CUDA: steps on the tensor cores
    algorithm: int = 0  # on CUDA: place in algorithms.ALGORITHMS

    @property
    def out_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


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
    if _in_forward_mode():
        # A function's jvp is not itself differentiated forward: what it saved has lost the tangents
        # of other levels.
        if _transforms().count(torch._C._functorch.TransformType.Jvp) > 1:
            found = _reference((input, h0, c0, *weights), batch_sizes, seed, options)
            return found if return_cells else found[:3]
        result = _DualLSTMFunction.apply(input, h0, c0, batch_sizes, seed, how, *weights)
    elif torch.is_grad_enabled() and _requires_grad(input, h0, c0, *weights):
        result = LSTMFunction.apply(input, h0, c0, batch_sizes, seed, how, *weights)
    else:
        result = torch.ops.fastlstm.forward(
            input, h0, c0, weights, batch_sizes, seed, *options, return_cells
        )
    return (*result[:3], result[5]) if return_cells else tuple(result[:3])


class How(NamedTuple):
    """What LSTMFunction is given besides tensors."""

    options: Options
    return_cells: bool = False  # whether the cell states of every step have a gradient


def _requires_grad(*tensors: Tensor | None) -> bool:
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
        return torch.ops.fastlstm.forward(
            input, h0, c0, weights, batch_sizes, seed, *how.options, True
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
        # create_graph=True leaves grad mode on here; compiled graphs have no double backward.
        if (torch.is_grad_enabled() or _in_forward_mode()) and not torch.compiler.is_compiling():
            backward = _DualLSTMBackward if _in_forward_mode() else _LSTMBackward
            found = backward.apply(ctx.options, needs, *arriving, *ctx.saved_tensors)
        else:
            found = _LSTMBackward.forward(ctx.options, needs, *arriving, *ctx.saved_tensors)
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


def _in_forward_mode() -> bool:
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
        given = _operands(tangents)[2:]
        places = [j for j, x in enumerate(given) if x is not None]

        def stack(*own: Tensor) -> tuple[Tensor, ...]:
            return _reference(_put(operands, places, own), batch_sizes, seed, ctx.options)

        outputs, pull, *_ = torch.func.vjp(stack, *(operands[j] for j in places))
        push = torch.func.vjp(pull, tuple(torch.zeros_like(y) for y in outputs))[1]
        (found,) = push(tuple(given[j] for j in places))
        *first, cells = found
        return (*first, None, None, cells if ctx.return_cells else None)


def _operands(arguments: Sequence[Any]) -> list[Any]:
    """LSTMFunction's arguments without the options: lengths and seed, input, states, weights."""
    input, h0, c0, batch_sizes, seed, _, *weights = arguments
    return [batch_sizes, seed, input, h0, c0, *weights]


def _reference(
    operands: Sequence[Any], batch_sizes: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    """The stack by its equations in PyTorch, all cell states last: operands are input, states and
    weights."""
    input, h0, c0, *weights = operands
    given = options._asdict()
    del given["allow_tf32"], given["algorithm"]
    *results, cells = reference.lstm(
        input, h0, c0, weights, seed=seed, batch_sizes=batch_sizes, return_cells=True, **given
    )
    # In the type that the kernels keep them in.
    return (*results, cells if cells.dtype == torch.float64 else cells.float())


def _put(into: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    found = list(into)
    for j, value in zip(places, values, strict=True):
        found[j] = value
    return found


def _split(tensors: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """The tensors of _LSTMBackward: gradients; lengths and seed; saved; input, states, weights."""
    return tensors[:4], tensors[4:6], tensors[6:10], tensors[10:]


class _LSTMBackward(torch.autograd.Function):
    """The native backward; its own gradient differentiates the reference."""

    @staticmethod
    def forward(options: Options, needs: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
        grads, (batch_sizes, seed), saved, operands = _split(tensors)
        input, h0, c0, *weights = operands
        grad_input, grad_h0, grad_c0, grad_weights = torch.ops.fastlstm.backward(
            *grads, input, h0, c0, weights, batch_sizes, seed, *saved, *options, needs
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
        to_grads, to_operands = _Derivatives(ctx, wanted).pull(grad_grads)
        return (None, None, *to_grads, *(None,) * 6, *to_operands)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> transforms.Rule:
        return transforms.one_by_one(cls.apply, info.batch_size, in_dims, args)


class _Derivatives:
    """The first derivatives as a function, and its own: what _LSTMBackward's context saved."""

    def __init__(self, ctx: Any, wanted: Sequence[bool]) -> None:
        self.batch_sizes, self.seed, *tensors = ctx.saved_tensors
        self.options, self.grads, self.operands = ctx.options, tensors[:4], tensors[4:]
        self.used = [j for j, grad in enumerate(self.grads) if grad is not None]
        self.floats = [
            j for j, x in enumerate(self.operands) if x is not None and x.is_floating_point()
        ]
        self.chosen = [j for j in self.floats if ctx.needs[j] and wanted[j]]
        self.at = (
            tuple(self.grads[j] for j in self.used),
            tuple(self.operands[j] for j in self.floats),
        )

    def first(self, grads: tuple, operands: tuple) -> tuple[Tensor, ...]:
        """Of the chosen operands, from the gradients that arrive and the operands."""

        def stack(*own: Tensor) -> tuple[Tensor, ...]:
            every = _put(self.operands, self.floats, own)
            found = _reference(every, self.batch_sizes, self.seed, self.options)
            return tuple(found[j] for j in self.used)

        pull = torch.func.vjp(stack, *operands)[1]
        by_place = dict(zip(self.floats, pull(grads), strict=True))
        return tuple(by_place[j] for j in self.chosen)

    def pull(self, cotangents: Sequence[Tensor | None]) -> tuple[list, list]:
        pull = torch.func.vjp(self.first, *self.at)[1]
        to_grads, to_operands = pull(tuple(cotangents[j] for j in self.chosen))
        return (
            _put([None] * 4, self.used, to_grads),
            _put([None] * len(self.operands), self.floats, to_operands),
        )

    def push(self, grads: Sequence[Any], operands: Sequence[Any]) -> list[Tensor]:
        """Tangents of all operands' derivatives: pull is linear, and its own pull is push."""
        tangents = tuple(
            tuple(
                torch.zeros_like(x) if given[j] is None else given[j]
                for j, x in zip(places, at, strict=True)
            )
            for given, places, at in zip(
                (grads, operands), (self.used, self.floats), self.at, strict=True
            )
        )
        outputs, pull, *_ = torch.func.vjp(self.first, *self.at)
        push = torch.func.vjp(pull, tuple(torch.zeros_like(y) for y in outputs))[1]
        (found,) = push(tangents)
        like = self.operands[-1]
        return _put([like.new_zeros(0)] * len(self.operands), self.chosen, found)


class _DualLSTMBackward(_LSTMBackward):
    """With forward-mode derivatives, as torch.func.hessian asks for."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _LSTMBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grads, _, _, operands = _split(tangents[2:])
        derivatives = _Derivatives(ctx, [True] * len(operands))
        return tuple(derivatives.push(grads, operands))


# The raw operators under autograd: through the functions above, so that a direct call has its
# gradient too. Below autograd they are the native kernels.
_library = torch.library.Library("fastlstm", "IMPL")


def _forward_autograd(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and _requires_grad(input, h0, c0, *weights):
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
    if torch.is_grad_enabled() and _requires_grad(*grads, input, h0, c0, *weights):
        *options, needs = arguments
        found = _LSTMBackward.apply(
            Options(*options), needs, *grads, batch_sizes, seed, *saved, input, h0, c0, *weights
        )
        return found[0], found[1], found[2], list(found[3:])
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastlstm.backward(
            *grads, input, h0, c0, weights, batch_sizes, seed, *saved, *arguments
        )


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
    hidden_size: int,
    num_layers: int,
    has_bias: bool,
    proj_size: int,
    bidirectional: bool,
    dropout: float,
    recurrent_dropout: float,
    zoneout_h: float,
    zoneout_c: float,
    cell_clip: float,
    layer_norm: bool,
    allow_tf32: bool,
    algorithm: int,
    save: bool,
) -> tuple[Tensor, ...]:
    options = Options(hidden_size, num_layers, has_bias, proj_size, bidirectional, dropout)
    like, directions = weights[0], options.directions
    cells, wide = num_layers * directions, directions * options.out_size
    if batch_sizes is None:
        leading: tuple = tuple(input.shape[:2])
        rows = input.shape[0] * input.shape[1]
        batch: int | torch.SymInt = input.shape[1]
    else:
        leading = (input.shape[0],)
        rows = input.shape[0]
        # How many sequences there are stands in the data of batch_sizes, unless a state says it.
        given = h0 if h0 is not None else c0
        batch = given.shape[1] if given is not None else torch.library.get_ctx().new_dynamic_size()
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (
        like.new_empty(*leading, wide),
        like.new_empty(cells, batch, options.out_size),
        like.new_empty(cells, batch, hidden_size),
        like.new_empty(num_layers - 1 if save else 0, rows, wide),
        like.new_empty(cells if save else 0, rows, (12 if layer_norm else 4) * hidden_size),
        like.new_empty(cells if save else 0, rows, hidden_size, dtype=accumulated),
    )


@torch.library.register_fake("fastlstm::backward")
def _backward_fake(
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
    hidden_size: int,
    num_layers: int,
    has_bias: bool,
    proj_size: int,
    bidirectional: bool,
    dropout: float,
    recurrent_dropout: float,
    zoneout_h: float,
    zoneout_c: float,
    cell_clip: float,
    layer_norm: bool,
    allow_tf32: bool,
    algorithm: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def gradient(needed: bool, like: Tensor | None) -> Tensor:
        shape = like.shape if needed and like is not None else (0,)
        return weights[0].new_empty(shape)

    dense = input.dtype not in _INDEX_TYPES
    return (
        gradient(needs[0] and dense, input),
        gradient(needs[1], h0),
        gradient(needs[2], c0),
        [gradient(need, w) for need, w in zip(needs[3:], weights, strict=True)],
    )


@torch.library.register_fake("fastlstm::_activations")
def _activations_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
