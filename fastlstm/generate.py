"""Drawing text from a stack and its decoder in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase

from . import native
from .drawing import Draw, loop
from .functional import Sizes, State, lstm_of_sizes
from .modules import LSTM
from .packing import PackedLSTM, pack
from .reference import INDEX_TYPES, CellRules

__all__ = ["generate", "prepack"]

_STORAGE = ("fp32", "bf16", "int8")


def generate(
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

    On a CPU the whole stack runs in one native call, without dropout. With a vocabulary of V
    tokens, T steps, batch size B, L layers and ``P = proj_size or H``:

    Args:
        lstm: a unidirectional ``fastlstm.LSTM`` (or ``nn.LSTM``) with ``input_size`` V, or what
            :func:`prepack` made of one and its decoder. A module's weights are packed anew in
            every call, which takes as long as a hundred tokens or two: prepack for short calls.
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

    Modules on other devices, or with layer_norm, run step by step in torch, with the same results
    up to rounding.

    Raises:
        TypeError: lstm, decoder or prime is of another type.
        ValueError: a bidirectional LSTM, a decoder that does not fit, a prime of the wrong form,
            an option out of range.
        RuntimeError: hx or a parameter of the wrong shape, dtype or device.
        IndexError: a token outside ``0 .. V-1`` (on the CPU).
    """
    how = Draw(temperature, top_k, top_p)
    how.check()
    if temperature != 0:
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
        how = how._replace(seed=seed.cpu())
    return run(lstm, decoder, prime, length, hx, how)


def prepack(lstm: RNNBase, decoder: nn.Linear, weights: str = "fp32") -> PackedLSTM:
    """Copy and pack the weights for :func:`generate`, to be used as often as one likes.

    Args:
        lstm, decoder: as for :func:`generate`, on the CPU.
        weights: how they are stored: "fp32"; "bf16", half as large and faster; "int8", a quarter,
            with a factor for every row, faster still. All compute in float32, and the first
            layer's input weights, one column a step, and the biases stay float32.

    Returns:
        The packed weights. They do not follow later changes of the parameters.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`generate`; ValueError for another name in
            ``weights``, and where "int8" meets a weight that is no finite number.
    """
    if weights not in _STORAGE:
        raise ValueError(f"weights must be one of {', '.join(_STORAGE)}, got {weights!r}")
    return _pack(*_module(lstm, decoder), weights, _rules(lstm))


@torch.no_grad()
def run(
    lstm: RNNBase | PackedLSTM,
    decoder: nn.Linear | None,
    prime: Tensor,
    length: int,
    hx: State | None,
    how: Draw,
    offset: int = 0,
) -> tuple[Tensor, State]:
    """:func:`generate` with a seed that is known, from draw number ``offset`` of its stream on."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if isinstance(lstm, PackedLSTM):
        if decoder is not None:
            raise TypeError("decoder must be None, for packed weights have one")
        packed = lstm
    else:
        weights, sizes, head = _module(lstm, decoder)
        if weights[0].device.type != "cpu" or sizes.layer_norm:
            return _loop(weights, sizes, head, prime, length, hx, how, offset, _rules(lstm))
        lossless = {torch.float64: "fp64", torch.bfloat16: "bf16"}
        storage = lossless.get(weights[0].dtype, "fp32")
        packed = _pack(weights, sizes, head, storage, _rules(lstm))
    sizes, computed = packed.sizes, packed.computed
    rules = packed.rules or CellRules()
    prime = _check_prime(prime, sizes.input_size, torch.device("cpu"))
    if hx is not None:
        hx = _check_state(hx, sizes, prime, (computed, packed.dtype))
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
        sizes.hidden_size,
        sizes.num_layers,
        sizes.proj_size,
        rules.zoneout_h,
        rules.zoneout_c,
        rules.cell_clip,
        length,
        how.temperature,
        how.top_k or 0,
        1.0 if how.top_p is None else how.top_p,
        how.seed,
        offset,
    )
    return tokens, (h_n, c_n)


def _module(lstm: Any, decoder: Any) -> tuple[list[Tensor], Sizes, nn.Linear]:
    """The weights and sizes of a module that can draw text with this decoder."""
    if not isinstance(lstm, RNNBase) or lstm.mode != "LSTM":
        raise TypeError(
            f"lstm must be a fastlstm.LSTM or what fastlstm.prepack returned, got {_kind(lstm)}"
        )
    if not isinstance(decoder, nn.Linear):
        raise TypeError(f"decoder must be an nn.Linear, got {_kind(decoder)}")
    if lstm.bidirectional:
        raise ValueError("lstm must be unidirectional: a reverse direction would read what follows")
    sizes = Sizes(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        bool(lstm.bias),
        proj_size=lstm.proj_size,
        layer_norm=isinstance(lstm, LSTM) and lstm._sizes().layer_norm,
    )
    if (decoder.in_features, decoder.out_features) != (sizes.out_size, sizes.input_size):
        raise ValueError(
            f"decoder must map {sizes.out_size} features to {sizes.input_size}, the width of "
            f"lstm's input; got {decoder.in_features} to {decoder.out_features}"
        )
    # By name at this moment, as fastlstm.LSTM reads them.
    weights = [getattr(lstm, name) for name in lstm._flat_weights_names]
    parameters = [*weights, *(x for x in (decoder.weight, decoder.bias) if x is not None)]
    for kind in ("dtype", "device"):
        found = {str(getattr(x, kind)) for x in parameters}
        if len(found) > 1:
            raise RuntimeError(
                f"lstm and decoder must have one {kind}, got {', '.join(sorted(found))}"
            )
    return weights, sizes, decoder


def _rules(lstm: RNNBase) -> CellRules | None:
    return lstm._cell_rules() if isinstance(lstm, LSTM) else None


def _kind(x: Any) -> str:
    return type(x).__name__


def _pack(
    weights: Sequence[Tensor],
    sizes: Sizes,
    decoder: nn.Linear,
    storage: str,
    rules: CellRules | None,
) -> PackedLSTM:
    if sizes.layer_norm:
        raise ValueError("weights of an LSTM with layer_norm cannot be packed: give the module")
    if weights[0].device.type != "cpu":
        raise RuntimeError(f"packed weights are for the CPU, got a module on {weights[0].device}")
    packed = pack(weights, sizes, decoder.weight, decoder.bias, storage, rules)
    if not all(scale.isfinite().all() for scale in packed.scales):
        raise ValueError('weights="int8" needs weights that are finite numbers')
    return packed


def _check_prime(prime: Tensor, vocabulary: int, device: torch.device) -> Tensor:
    if not isinstance(prime, Tensor) or prime.dtype not in INDEX_TYPES:
        found = prime.dtype if isinstance(prime, Tensor) else _kind(prime)
        raise TypeError(f"prime must be an int64 or int32 tensor, got {found}")
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


def _check_state(hx: State, sizes: Sizes, prime: Tensor, dtypes: tuple[torch.dtype, ...]) -> State:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx must be a tuple of two tensors, got {_kind(hx)}")
    for j, width in enumerate((sizes.out_size, sizes.hidden_size)):
        expected = (sizes.num_layers, prime.shape[1], width)
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
    sizes: Sizes,
    decoder: nn.Linear,
    prime: Tensor,
    length: int,
    hx: State | None,
    how: Draw,
    offset: int,
    rules: CellRules | None = None,
) -> tuple[Tensor, State]:
    """Step by step through torch, for devices without a kernel."""

    def step(tokens: Tensor, hx: State | None) -> tuple[Tensor, State]:
        output, hx = lstm_of_sizes(tokens, hx, weights, sizes, rules=rules)
        return F.linear(output[-1], decoder.weight, decoder.bias), hx

    dtype = weights[0].dtype
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    prime = _check_prime(prime, sizes.input_size, weights[0].device)
    if hx is not None:
        h0, c0 = _check_state(hx, sizes, prime, (computed, dtype))
        hx = (h0.to(dtype), c0.to(dtype))
    tokens, (h_n, c_n) = loop(step, prime, length, hx, how, offset)
    return tokens, (h_n.to(computed), c_n.to(computed))


@torch.library.register_fake("fastlstm::generate")
def _generate_fake(
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
