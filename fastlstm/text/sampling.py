"""Drawing text from a model, one character after another, and scoring text."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import UserError
from .model import CharModel, loss_nats


def encode(text: bytes, vocabulary: list[int]) -> Tensor:
    """int64 ``(T, 1)`` vocabulary indices.

    Raises:
        UserError: a byte that the model has never seen.
    """
    table = torch.full((256,), -1, dtype=torch.int64)
    table[torch.tensor(vocabulary)] = torch.arange(len(vocabulary))
    indices = table[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]
    if (indices < 0).any():
        place = int((indices < 0).nonzero()[0])
        raise UserError(
            f"the model has never seen {text[place : place + 1]!r}, byte {place} of the text"
        )
    return indices[:, None]


def start(vocabulary: list[int]) -> Tensor:
    """int64 ``(1, 1)``, what a text without a primer begins after: a newline where there is one."""
    return torch.tensor([[vocabulary.index(10) if 10 in vocabulary else 0]])


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits ``(B, V)`` with all but the k largest, or all outside the nucleus p, at -inf."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        drop[:, top_k:] = True
    if top_p is not None:
        p = ordered.masked_fill(drop, float("-inf")).softmax(-1)
        # A character stays while those before it hold less than top_p: the first always does.
        drop |= p.cumsum(-1) - p >= top_p
        drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


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
        top_k, top_p: draw from the k likeliest, from the likeliest of total probability p.
        generator: on the model's device.
    """
    logits, hx = model(prime)
    for j in range(length):
        last = logits[-1].float()
        if temperature == 0:
            token = last.argmax(-1)
        else:
            last = (last - last.amax(-1, keepdim=True)) / max(temperature, 1e-30)
            if top_k is not None or top_p is not None:
                last = filtered(last, top_k, top_p)
            token = torch.multinomial(last.softmax(-1), 1, generator=generator)[:, 0]
        yield token
        if j + 1 < length:
            logits, hx = model(token[None], hx)


def sample_text(model: CharModel, vocabulary: list[int], length: int, seed: int) -> str:
    """A sample for the eyes of whoever trains; the generators of training are left alone."""
    training = model.training
    model.eval()
    device = model.decoder.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    prime = start(vocabulary).to(device)
    tokens = torch.stack(list(draw(model, prime, length, temperature=0.8, generator=generator)))
    model.train(training)
    return bytes(vocabulary[t] for t in tokens[:, 0].tolist()).decode("utf-8", errors="replace")


def score(model: CharModel, indices: Tensor, window: int = 256) -> float:
    """Mean loss in nats a character of int64 ``(T, 1)``, T at least 2, state carried throughout.

    The first character is given, not predicted.
    """
    total = 0.0
    state: Any = None
    with torch.inference_mode():
        for begin in range(0, len(indices) - 1, window):
            x, y = indices[begin : begin + window], indices[begin + 1 : begin + window + 1]
            logits, state = model(x[: len(y)], state)
            total += loss_nats(logits, y).item() * len(y)
    return total / (len(indices) - 1)


class Decoder:
    """Bytes to text as they come, up to a stop string."""

    def __init__(self, stop: str | None = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._held = stop, ""
        self.ended = False

    def feed(self, data: bytes, final: bool = False) -> str:
        """What can be shown now; the beginning of a character or of the stop string waits."""
        if self.ended:
            return ""
        self._held += self._decoder.decode(data, final)
        if self._stop and self._stop in self._held:
            self.ended = True
            return self._held.split(self._stop)[0]
        keep = 0 if final or not self._stop else len(self._stop) - 1
        cut = max(0, len(self._held) - keep)
        out, self._held = self._held[:cut], self._held[cut:]
        return out
