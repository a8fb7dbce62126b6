"""Drawing text from a model, one character after another, and scoring text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..generation.draw import Draw, loop
from ..generation.generate import packs, prepack, run
from ..generation.packed_weights import rounded
from ..modules import LSTM
from .alphabet import Alphabet, Decoder
from .model import CharModel, loss_nats

TOGETHER = 256  # texts that are drawn at a time


def stream(
    model: CharModel,
    prime: Tensor,
    length: int,
    draw: Draw,
    *,
    weights: str = "fp32",
    chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yield ``length`` characters in all, int64 ``(n, B)`` with n at most ``chunk``.

    The characters do not depend on ``chunk``.

    Args:
        model: in eval mode. An LSTM draws a chunk in one native call (``fastlstm.generate``).
        prime: int64 ``(T, B)``, T at least 1, what comes before.
        weights: how they are stored meanwhile, as in ``fastlstm.prepack``.
        chunk: by default 32; 512 on a GPU, where a launch first loads all weights.
    """
    native = isinstance(model.rnn, (LSTM, nn.LSTM)) and packs(model.rnn, model.decoder, weights)
    chunk = chunk or (512 if native and prime.device.type == "cuda" else 32)
    if native:
        packed = prepack(model.rnn, model.decoder, weights)
    elif weights != "fp32":
        model = rounded_model(model, weights)

    def step(tokens: Tensor, hx: Any) -> tuple[Tensor, Any]:
        logits, hx = model(tokens, hx)
        return logits[-1], hx

    hx: Any = None
    for drawn in range(0, length, chunk):
        n = min(chunk, length - drawn)
        with torch.inference_mode():
            if native:
                tokens, hx = run(packed, None, prime, n, hx, draw, drawn)
            else:
                tokens, hx = loop(step, prime, n, hx, draw, drawn)
        yield tokens
        prime = tokens[-1:]


def stream_text(
    model: CharModel,
    alphabet: Alphabet,
    prime: Tensor,
    length: int,
    draw: Draw,
    *,
    weights: str = "fp32",
    stop: str | None = None,
) -> Iterator[str]:
    """Yield one text in pieces as they are drawn; it ends before ``stop``."""
    decoder = Decoder(stop)
    for tokens in stream(model, prime, length, draw, weights=weights):
        yield decoder.feed(alphabet.decode(tokens[:, 0].tolist()))
        if decoder.ended:
            return
    yield decoder.feed(b"", final=True)


def draw_texts(
    model: CharModel,
    alphabet: Alphabet,
    prime: Tensor,
    length: int,
    draw: Draw,
    count: int,
    *,
    weights: str = "fp32",
    stop: str | None = None,
    drawn: Callable[[int], object] = lambda characters: None,
) -> Iterator[str]:
    """Yield ``count`` texts, drawn a part at a time: the first come soon, and memory holds them.

    Args:
        draw: its ``seed`` is that of the first part.
        drawn: called with the number of characters whenever some were drawn.
    """
    assert draw.seed is not None
    for first in range(0, count, TOGETHER):
        columns = min(TOGETHER, count - first)
        seed = torch.tensor([(int(draw.seed) + (first // TOGETHER << 32)) % 2**63])
        chunks = []
        for chunk in stream(model, prime.expand(-1, columns), length, draw._replace(seed=seed),
                            weights=weights):  # fmt: skip
            chunks.append(chunk)
            drawn(chunk.numel())
        for column in torch.cat(chunks).t().tolist():
            yield Decoder(stop).feed(alphabet.decode(column), final=True)


def rounded_model(model: CharModel, weights: str) -> CharModel:
    """A copy that computes with the weights as ``fastlstm.prepack`` would store them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name != "rnn.weight_ih_l0":
                parameter.copy_(rounded(parameter, weights))
    return model


def sample_text(model: CharModel, alphabet: Alphabet, length: int, seed: int) -> str:
    """A sample for the eyes of whoever trains; the generators of training are left alone."""
    training = model.training
    model.eval()
    prime = alphabet.start().to(model.decoder.weight.device)
    draw = Draw(temperature=0.8, seed=torch.tensor([seed]))
    tokens = torch.cat(list(stream(model, prime, length, draw, chunk=length)))
    model.train(training)
    return alphabet.text(tokens[:, 0].tolist())


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
