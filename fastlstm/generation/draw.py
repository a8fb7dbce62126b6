"""Drawing tokens from logits in torch, for models that the native kernels do not run.

csrc/draw.h and csrc/cpu/draw.cpp do the same. Of a row's tokens the one with the largest
``logit / temperature + noise`` is drawn, with noise of Gumbel's distribution: a draw from the
softmax. The noise of a token follows from the seed, the number of the draw, the batch row and the
token, so that a text does not depend on how it was cut into calls.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_value
from ..dropout import OUTPUT, U32, UPDATE, hashed_rows, mix32

__all__ = ["Draw", "choose", "filtered", "loop", "noise"]


Capture = Callable[[Callable[[], None], Sequence[Tensor]], Callable[[], None]]
"""From a function and the buffers that it changes to a call that repeats it."""


class Draw(NamedTuple):
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p: draw from the k likeliest, from the likeliest of total probability p.
        seed: one int64 element on the CPU; None at temperature 0.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: Tensor | None = None

    def check(self) -> None:
        """Raise ValueError for a value out of range, TypeError for what is no number."""
        rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("temperature", lambda t: 0 <= t < math.inf, "a number that is not negative"),
            (
                "top_k",
                lambda k: k is None or operator.index(k) >= 1,
                "a whole number from 1, or None",
            ),
            ("top_p", lambda p: p is None or 0 < p <= 1, "a number in (0, 1], or None"),
        )
        for name, valid, expected in rules:
            check_value(name, getattr(self, name), valid, f"must be {expected}")


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits ``(B, V)`` with all but the k largest, or all outside the nucleus p, at -inf."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        drop[:, top_k:] = True
    if top_p is not None and top_p < 1:
        p = ordered.masked_fill(drop, -math.inf).softmax(-1)
        # A token stays while those before it hold less than top_p: the first always does.
        drop |= p.cumsum(-1) - p >= top_p
        drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)


def noise(
    seed: Tensor, first: int, count: int, batch: int, vocabulary: int, device: torch.device
) -> Tensor:
    """float64 ``(count, batch, vocabulary)``, for draws ``first`` and on."""
    steps = torch.arange(first, first + count, device=device).unsqueeze(1)
    rows, tokens = (torch.arange(n, device=device) for n in (batch, vocabulary))
    upper, low = (
        hashed_rows(seed, 0, 0, steps, rows, stream).unsqueeze(-1) for stream in (OUTPUT, UPDATE)
    )
    k = mix32(((tokens * 0x9E3779B9 & U32 ^ upper) + low) & U32) << 20 | low >> 12
    u = (k.double() + 0.5) * 2.0**-52
    return -(-u.log()).log()


def choose(logits: Tensor, draw: Draw, noise: Tensor | None) -> Tensor:
    """int64 ``(B,)``, the tokens that ``noise`` draws from logits, both ``(B, V)``.

    Args:
        noise: of one draw of :func:`noise`; None takes the likeliest.
    """
    if noise is None:
        return logits.argmax(-1)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / draw.temperature
    if draw.top_k is not None or draw.top_p is not None:
        logits = filtered(logits, draw.top_k, draw.top_p)
    return (logits + noise).argmax(-1)


class _Noise:
    """The noise of a text's draws, many at a time: one draw's takes two dozen operations."""

    ELEMENTS = 2**18

    def __init__(self, draw: Draw, first: int, length: int, logits: Tensor) -> None:
        """For ``length`` draws, of which draw ``first`` is from these logits."""
        self._first, self._seed = first, draw.seed
        self._sizes = (*logits.shape, logits.device)
        self.count = min(length, max(1, self.ELEMENTS // logits.numel()))
        greedy = draw.temperature == 0 or draw.seed is None
        self.block = (
            None if greedy else logits.new_empty(self.count, *logits.shape, dtype=torch.float64)
        )
        """``(count, B, V)``, of the draw that was prepared last and its neighbours."""
        self.prepare(0)

    def prepare(self, j: int) -> None:
        """Compute what draw j of the text reads. Called for every one in turn."""
        if self.block is not None and self._seed is not None and j % self.count == 0:
            self.block.copy_(noise(self._seed, self._first + j, self.count, *self._sizes))

    def of(self, j: int) -> Tensor | None:
        return None if self.block is None else self.block[j % self.count]


def loop(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    prime: Tensor,
    length: int,
    hx: Any,
    draw: Draw,
    offset: int = 0,
    capture: Capture | None = None,
) -> tuple[Tensor, Any]:
    """Draw ``length`` tokens after ``prime``, int64 ``(T, B)``.

    Args:
        step: from int64 ``(T, B)`` and a state to the last step's logits and the next state.
        offset: number of the first draw in the seed's stream.
        capture: makes a call that repeats what a function does to its buffers, for a state that is
            a tuple of tensors. It repeats all draws but the first.

    Returns:
        ``tokens, hx``: int64 ``(length, B)``, and the state before the last of them.
    """
    logits, hx = step(prime, hx)
    noises = _Noise(draw, offset, length, logits)
    last = choose(logits, draw, noises.of(0)).unsqueeze(0)
    if capture is not None and length > 1:
        return _captured(step, last, length, hx, draw, noises, capture)
    tokens = [last]
    for j in range(1, length):
        logits, hx = step(last, hx)
        noises.prepare(j)
        last = choose(logits, draw, noises.of(j)).unsqueeze(0)
        tokens.append(last)
    return torch.cat(tokens), hx


def _captured(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    last: Tensor,
    length: int,
    hx: tuple[Tensor, ...],
    draw: Draw,
    noises: _Noise,
    capture: Capture,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`loop` after its first draw, ``last``: every further one is the same work on the same
    buffers."""
    tokens = last.new_zeros(length, last.shape[1])
    tokens[0] = last[0]
    state = tuple(x.clone() for x in hx)
    number = torch.ones(1, dtype=torch.int64, device=last.device)  # of the next draw

    def advance() -> None:
        logits, following = step(last, state)
        block = noises.block
        noise = None if block is None else block.index_select(0, number % noises.count)[0]
        last.copy_(choose(logits, draw, noise).unsqueeze(0))
        tokens.index_copy_(0, number, last)
        for x, y in zip(state, following, strict=True):
            x.copy_(y)
        number.add_(1)

    repeat = capture(advance, (last, number, *state))
    for j in range(1, length):
        noises.prepare(j)
        repeat()
    return tokens, state
