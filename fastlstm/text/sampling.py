"""Drawing text from a model, one character after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import UserError
from .model import CharModel


def encode(text: bytes, vocabulary: list[int]) -> Tensor:
    """int64 ``(T, 1)`` vocabulary indices.

    Raises:
        UserError: a byte that the model has never seen.
    """
    place = {value: j for j, value in enumerate(vocabulary)}
    unknown = [value for value in text if value not in place]
    if unknown:
        shown = bytes(unknown[:1])
        raise UserError(f"the model has never seen {shown!r}, which the text holds")
    return torch.tensor([place[value] for value in text], dtype=torch.int64)[:, None]


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits ``(B, V)`` with all but the k largest, or all outside the nucleus p, at -inf."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        # A character stays while those before it hold less than top_p: the first always does.
        drop = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
    return logits


@torch.inference_mode()
def draw(
    model: CharModel,
    prime: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield ``length`` times the next characters, int64 ``(B,)``.

    Args:
        prime: int64 ``(T, B)``, T at least 1, what comes before.
        temperature: divides the logits; 0 takes the most likely character.
    """
    logits, hx = model(prime)
    for j in range(length):
        last = logits[-1].float()
        if temperature == 0:
            token = last.argmax(-1)
        else:
            p = filtered(last / temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)[:, 0]
        yield token
        if j + 1 < length:
            logits, hx = model(token[None], hx)


def sample_text(model: CharModel, vocabulary: list[int], length: int, seed: int) -> str:
    """A sample for the eyes of whoever trains; the generators of training are left alone."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    newline = vocabulary.index(10) if 10 in vocabulary else 0
    prime = torch.full((1, 1), newline, device=device)
    tokens = [int(t) for t in draw(model, prime, length, temperature=0.8, generator=generator)]
    model.train(training)
    return bytes(vocabulary[t] for t in tokens).decode("utf-8", errors="replace")


def score(model: CharModel, indices: Tensor, window: int = 256) -> float:
    """Mean loss in nats a character of int64 ``(T, 1)``, T at least 2, state carried throughout."""
    from .model import loss_nats

    total, hx = 0.0, None
    state: Any = hx
    with torch.inference_mode():
        for begin in range(0, len(indices) - 1, window):
            x, y = indices[begin : begin + window], indices[begin + 1 : begin + window + 1]
            logits, state = model(x[: len(y)], state)
            total += loss_nats(logits, y).item() * len(y)
    return total / (len(indices) - 1)
