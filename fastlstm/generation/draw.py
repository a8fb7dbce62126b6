"""Drawing tokens from logits in torch, for models that the native kernels do not run.

csrc/cpu/draw.cpp does the same: a seed names a stream of uniform numbers, of which draw ``step`` in
batch row ``b`` takes one, so that a text does not depend on how it was cut into calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import hashed_rows

__all__ = ["Draw", "choose", "filtered", "loop", "uniforms"]


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
        """Raise ValueError for a value out of range."""
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "a number that is not negative"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number in (0, 1], or None"),
        )
        for name, valid, expected in rules:
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


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


def uniforms(draw: Draw, first: int, count: int, batch: int) -> Tensor | None:
    """float32 ``(count, batch)`` in [0, 1], for draws ``first`` and on; None where greedy."""
    if draw.temperature == 0 or draw.seed is None:
        return None
    steps = torch.arange(first, first + count).unsqueeze(1)
    return (hashed_rows(draw.seed, 0, 0, steps, torch.arange(batch)) + 0.5) * 2.0**-32


def choose(logits: Tensor, draw: Draw, uniform: Tensor | None) -> Tensor:
    """int64 ``(B,)``, the tokens that ``uniform`` ``(B,)`` draws from logits ``(B, V)``.

    Args:
        uniform: of :func:`uniforms`; None takes the likeliest.
    """
    if uniform is None:
        return logits.argmax(-1)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / draw.temperature
    if draw.top_k is not None or draw.top_p is not None:
        logits = filtered(logits, draw.top_k, draw.top_p)
    cumulative = logits.exp().cumsum(-1)
    # Inverse transform sampling: the first token whose cumulative weight exceeds the mark.
    mark = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return (cumulative <= mark).sum(-1)


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
    numbers = uniforms(draw, offset, length, prime.shape[1])
    if numbers is not None:
        numbers = numbers.to(prime.device)
    logits, hx = step(prime, hx)
    last = choose(logits, draw, None if numbers is None else numbers[0]).unsqueeze(0)
    if capture is not None and length > 1:
        return _captured(step, last, length, hx, draw, numbers, capture)
    tokens = [last]
    for j in range(1, length):
        logits, hx = step(last, hx)
        last = choose(logits, draw, None if numbers is None else numbers[j]).unsqueeze(0)
        tokens.append(last)
    return torch.cat(tokens), hx


def _captured(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    last: Tensor,
    length: int,
    hx: tuple[Tensor, ...],
    draw: Draw,
    numbers: Tensor | None,
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
        uniform = None if numbers is None else numbers.index_select(0, number)[0]
        last.copy_(choose(logits, draw, uniform).unsqueeze(0))
        tokens.index_copy_(0, number, last)
        for x, y in zip(state, following, strict=True):
            x.copy_(y)
        number.add_(1)

    repeat = capture(advance, (last, number, *state))
    for _ in range(1, length):
        repeat()
    return tokens, state
