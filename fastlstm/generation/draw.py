"""Drawing tokens from logits in torch, for models that the native kernels do not run.

csrc/cpu/draw.cpp does the same: a seed names a stream of uniform numbers, of which draw ``step`` in
batch row ``b`` takes one, so that a text does not depend on how it was cut into calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import hashed_rows

__all__ = ["Draw", "choose", "filtered", "loop"]


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


def choose(logits: Tensor, draw: Draw, step: int) -> Tensor:
    """int64 ``(B,)``, the tokens of draw number ``step`` from logits ``(B, V)``."""
    if draw.temperature == 0 or draw.seed is None:
        return logits.argmax(-1)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / draw.temperature
    if draw.top_k is not None or draw.top_p is not None:
        logits = filtered(logits, draw.top_k, draw.top_p)
    cumulative = logits.exp().cumsum(-1)
    rows = torch.arange(len(logits))
    uniform = (hashed_rows(draw.seed, 0, 0, torch.full_like(rows, step), rows) + 0.5) * 2**-32
    # Inverse transform sampling: the first token whose cumulative weight exceeds the mark.
    mark = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return (cumulative <= mark).sum(-1)


def loop(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    prime: Tensor,
    length: int,
    hx: Any,
    draw: Draw,
    offset: int = 0,
) -> tuple[Tensor, Any]:
    """Draw ``length`` tokens after ``prime``, int64 ``(T, B)``.

    Args:
        step: from int64 ``(T, B)`` and a state to the last step's logits and the next state.
        offset: number of the first draw in the seed's stream.

    Returns:
        ``tokens, hx``: int64 ``(length, B)``, and the state before the last of them.
    """
    tokens, last = [], prime
    for j in range(length):
        logits, hx = step(last, hx)
        last = choose(logits, draw, offset + j).unsqueeze(0)
        tokens.append(last)
    return torch.cat(tokens), hx
