"""Drawing text from a stack and its decoder in one native call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase

from .. import functional
from ..checks import check_value
from ..modules import stack_of
from ..ops import native
from ..stack import INDEX_TYPES, Stack, State
from .draw import Draw, loop
from .graphs import as_graph
from .packed_weights import PackedLSTM, pack

__all__ = ["generate", "prepack"]

_STORAGE = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16", "int8")}


def generate(  # what is read, and one argument for each option of drawing
    lstm: RNNBase | PackedLSTM,
    decoder: nn.Linear | None,
    prime: Tensor,
    length: int,
    *,
    hx: State | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, State]:
    """Read ``prime``, then draw ``length`` tokens, each of which is the input of the next step.

    The whole stack runs in one native call, without dropout; on a GPU in one launch for a text of
    64 rows or less (more on small models), with all weights on the chip. With a vocabulary of V
    tokens, T steps, batch size B, L layers and ``P = proj_size or H``:

    Args:
        lstm: a unidirectional ``fastlstm.LSTM`` (or ``nn.LSTM``) with ``input_size`` V, or what
            :func:`fastlstm.prepack` made of one and its decoder. A module's weights are packed anew
            in every call, which takes as long as a hundred tokens or two: prepack for short calls.
        decoder: ``nn.Linear(P, V)`` in the module's dtype; None for packed weights.
        prime: int64 or int32 ``(T, B)``, at least one step of one row, whatever ``batch_first``.
        length: number of tokens to draw, at least 1.
        hx: ``(h_0, c_0)`` of shapes ``(L, B, P)`` and ``(L, B, H)``, of the module's dtype or as
            returned; None for zeros.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens of total probability p (of those that top_k left).
        generator: gives the seed of this call; by default torch's default generator does. The same
            seed gives the same tokens, for any number of threads.

    Returns:
        ``tokens, (h_n, c_n)``: tokens int64 ``(length, B)``. The states have read the prime and
        all tokens but the last, so ``generate(..., tokens[-1:], n, hx=(h_n, c_n))`` goes on. They
        are float64 for float64 modules and float32 for others.

    A GPU gives the CPU's text in float32, but where rounding parts two tokens that are as likely;
    with half types h is rounded in every step. A row's text does not depend on the other rows.

    Modules on other devices, with layer_norm, or on a GPU with a projection, zoneout of h, float64
    or weights that its multiprocessors do not hold, run step by step in torch, with the same
    results up to rounding.

    Raises:
        TypeError: lstm, decoder or prime is of another type.
        ValueError: a bidirectional LSTM, a decoder that does not fit, a prime of the wrong form,
            an option out of range.
        RuntimeError: hx or a parameter of the wrong shape, dtype or device.
        IndexError: a token outside ``0 .. V-1`` (on the CPU).
    """
    draw = Draw(temperature, top_k, top_p)
    draw.check()
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"generator must be a torch.Generator or None, got {_kind(generator)}")
    if temperature != 0:
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
        draw = draw._replace(seed=seed.cpu())
    return run(lstm, decoder, prime, length, hx, draw)


def prepack(lstm: RNNBase, decoder: nn.Linear, weights: str = "fp32") -> PackedLSTM:
    """:func:`fastlstm.prepack` of a module and its decoder."""
    parameters, stack, head = _module(lstm, decoder)
    names = _STORAGE.get(parameters[0].device.type, _STORAGE["cpu"])
    if weights not in names:
        raise ValueError(f"weights must be one of {', '.join(names)}, got {weights!r}")
    return _pack(parameters, stack, head, weights)


def packs(lstm: RNNBase, decoder: nn.Linear, weights: str) -> bool:
    """Whether :func:`prepack` packs this module: whether a native call draws its text."""
    parameters, stack, _ = _module(lstm, decoder)
    return _refused(stack, parameters[0].device, weights) is None


@torch.no_grad()
def run(
    lstm: RNNBase | PackedLSTM,
    decoder: nn.Linear | None,
    prime: Tensor,
    length: int,
    hx: State | None,
    draw: Draw,
    offset: int = 0,
) -> tuple[Tensor, State]:
    """:func:`generate` with a seed that is known, from draw number ``offset`` of its stream on."""
    check_value("length", length, lambda n: operator.index(n) >= 1, "must be a whole number from 1")
    if isinstance(lstm, PackedLSTM):
        if decoder is not None:
            raise TypeError("decoder must be None, for packed weights have one")
        packed = lstm
    else:
        weights, stack, head = _module(lstm, decoder)
        on_gpu = weights[0].device.type == "cuda"
        storage = {
            torch.float64: "fp64",
            torch.bfloat16: "bf16",
            torch.float16: "fp16" if on_gpu else "fp32",
        }.get(weights[0].dtype, "fp32")
        if _refused(stack, weights[0].device, storage):
            return _loop(weights, stack, head, prime, length, hx, draw, offset)
        packed = _pack(weights, stack, head, storage)
    stack, computed = packed.stack, packed.computed
    prime = _check_prime(prime, stack.input_size, packed.table.device)
    if hx is not None:
        hx = _check_state(hx, stack, prime, (computed, packed.dtype))
    h0, c0 = (None, None) if hx is None else (hx[0].to(computed), hx[1].to(computed))
    tokens, h_n, c_n = native.call(
        torch.ops.fastlstm.generate,
        prime,
        h0,
        c0,
        packed.table,
        packed.matrices,
        packed.biases,
        packed.scales,
        stack.hidden_size,
        stack.num_layers,
        stack.proj_size,
        stack.zoneout_h,
        stack.zoneout_c,
        stack.cell_clip,
        length,
        draw.temperature,
        min(draw.top_k or 0, stack.input_size),
        1.0 if draw.top_p is None else draw.top_p,
        draw.seed,
        offset,
    )
    return tokens, (h_n, c_n)


def _module(lstm: Any, decoder: Any) -> tuple[list[Tensor], Stack, nn.Linear]:
    """The weights and the stack of a module that can draw text with this decoder."""
    if not isinstance(lstm, RNNBase) or lstm.mode != "LSTM":
        raise TypeError(
            f"lstm must be a fastlstm.LSTM or what fastlstm.prepack returned, got {_kind(lstm)}"
        )
    if not isinstance(decoder, nn.Linear):
        raise TypeError(f"decoder must be an nn.Linear, got {_kind(decoder)}")
    if lstm.bidirectional:
        raise ValueError("lstm must be unidirectional: a reverse direction would read what follows")
    stack = stack_of(lstm)
    if (decoder.in_features, decoder.out_features) != (stack.out_size, stack.input_size):
        raise ValueError(
            f"decoder must map {stack.out_size} features to {stack.input_size}, the width of "
            f"lstm's input; got {decoder.in_features} to {decoder.out_features}"
        )
    # By name at this moment, as fastlstm.LSTM reads them.
    weights = [getattr(lstm, name) for name in lstm._flat_weights_names]
    parameters = [*weights, *(x for x in (decoder.weight, decoder.bias) if x is not None)]
    for kind in ("dtype", "device"):
        kinds = {str(getattr(x, kind)) for x in parameters}
        if len(kinds) > 1:
            raise RuntimeError(
                f"lstm and decoder must have one {kind}, got {', '.join(sorted(kinds))}"
            )
    return weights, stack, decoder


def _kind(x: Any) -> str:
    return type(x).__name__


def _pack(weights: Sequence[Tensor], stack: Stack, decoder: nn.Linear, storage: str) -> PackedLSTM:
    device = weights[0].device
    if stack.layer_norm:
        raise ValueError("weights of an LSTM with layer_norm cannot be packed: give the module")
    if device.type not in _STORAGE:
        raise RuntimeError(f"packed weights are for CPUs and GPUs, got a module on {device}")
    if why := _refused(stack, device, storage):
        raise ValueError(f"weights on {device} cannot be packed, give the module: {why}")
    words = device.type == "cpu"
    parameters = [*weights, decoder.weight, *([] if decoder.bias is None else [decoder.bias])]
    # Without reading a GPU's. A sum takes a third of the time of isnan(), and shows every NaN.
    if words and any(bool(x.sum().isnan()) and bool(x.isnan().any()) for x in parameters):
        raise ValueError("lstm or decoder has a weight that is no number (NaN)")
    packed = pack(weights, stack, decoder.weight, decoder.bias, storage, words)
    if not all(scale.isfinite().all() for scale in packed.scales):
        raise ValueError('weights="int8" needs weights that are finite numbers')
    return packed


def _refused(stack: Stack, device: torch.device, storage: str) -> str | None:
    """Why the native kernels do not draw this model's text; None where they do."""
    if stack.layer_norm:
        return "no kernel draws text with layer_norm"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no kernels for device type {device.type!r}"
    if missing := native.missing_on_gpu(device.index):
        return missing
    for has, what in (
        (stack.proj_size > 0, "a projection"),
        (stack.zoneout_h > 0, "zoneout of h"),
        (storage == "fp64", "float64"),
    ):
        if has:
            return f"no GPU kernel draws text with {what}"
    capability, sms, shared, _ = native.gpu_sizes(device)
    plan = native._C.generate_plan(
        element_bytes=4 if storage == "fp32" else 2,
        hidden_size=stack.hidden_size,
        layers=stack.num_layers,
        vocabulary=stack.input_size,
        batch=1,
        capability=capability,
        sms=sms,
        shared_per_block=shared,
    )
    reason: str | None = plan["reason"]
    return reason


def _check_prime(prime: Tensor, vocabulary: int, device: torch.device) -> Tensor:
    if not isinstance(prime, Tensor) or prime.dtype not in INDEX_TYPES:
        kind = prime.dtype if isinstance(prime, Tensor) else _kind(prime)
        raise TypeError(f"prime must be an int64 or int32 tensor, got {kind}")
    if prime.dim() != 2 or prime.numel() == 0:
        raise ValueError(
            f"prime must have shape (T, B), at least one step of one row, got {tuple(prime.shape)}"
        )
    if prime.device != device:
        raise RuntimeError(f"prime must be on {device}, the weights' device, got {prime.device}")
    if device.type == "cpu":
        low, high = (int(x) for x in torch.aminmax(prime))
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"prime holds the token {low if low < 0 else high}, expected 0 to {vocabulary - 1}"
            )
    return prime.long()


def _check_state(hx: State, stack: Stack, prime: Tensor, dtypes: tuple[torch.dtype, ...]) -> State:
    if not isinstance(hx, (tuple, list)) or [isinstance(x, Tensor) for x in hx] != [True, True]:
        kinds = f" of {', '.join(map(_kind, hx))}" if isinstance(hx, (tuple, list)) else ""
        raise TypeError(f"hx must be a tuple of two tensors, got {_kind(hx)}{kinds}")
    for j, width in enumerate((stack.out_size, stack.hidden_size)):
        expected = (stack.num_layers, prime.shape[1], width)
        if hx[j].shape != expected:
            raise RuntimeError(f"hx[{j}] must have shape {expected}, got {tuple(hx[j].shape)}")
        if hx[j].dtype not in dtypes or hx[j].device != prime.device:
            raise RuntimeError(
                f"hx[{j}] must be {dtypes[0]} on {prime.device}, "
                f"got {hx[j].dtype} on {hx[j].device}"
            )
    return hx[0], hx[1]


def _loop(
    weights: Sequence[Tensor],
    stack: Stack,
    decoder: nn.Linear,
    prime: Tensor,
    length: int,
    hx: State | None,
    draw: Draw,
    offset: int,
) -> tuple[Tensor, State]:
    """Step by step, for models and devices that no kernel draws for; on a GPU as a CUDA graph."""

    def step(tokens: Tensor, hx: State | None) -> tuple[Tensor, State]:
        output, hx = functional.run(tokens, hx, weights, stack)
        return F.linear(output[-1], decoder.weight, decoder.bias), hx

    dtype = weights[0].dtype
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    prime = _check_prime(prime, stack.input_size, weights[0].device)
    if hx is not None:
        h0, c0 = _check_state(hx, stack, prime, (computed, dtype))
        hx = (h0.to(dtype), c0.to(dtype))
    capture = as_graph if prime.device.type == "cuda" else None
    tokens, (h_n, c_n) = loop(step, prime, length, hx, draw, offset, capture)
    return tokens, (h_n.to(computed), c_n.to(computed))


@torch.library.register_fake("fastlstm::generate")
def _generate_fake(  # the operator's arguments
    prime: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    table: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    scales: list[Tensor],
    hidden_size: int,
    num_layers: int,
    proj_size: int,
    zoneout_h: float,
    zoneout_c: float,
    cell_clip: float,
    length: int,
    *choice: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = prime.shape[1]
    return (
        prime.new_empty(length, batch),
        table.new_empty(num_layers, batch, proj_size or hidden_size),
        table.new_empty(num_layers, batch, hidden_size),
    )
