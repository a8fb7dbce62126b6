"""A tokenizer in front of the LSTM, or an embedding in place of one-hot input, in bits a byte.

Byte-pair encodings are learned on the training text, which every model passes over equally often.
Needs ``pip install tokenizers``. Run it: ``python examples/tokenizer.py my.txt``.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

import fastlstm

HELD_OUT = 0.05  # of the text, at its end
BATCH, STEPS = 16, 64  # streams, and units that gradients flow back through


class Bytes:
    """A byte is a unit."""

    size = 256

    def encode(self, text: str) -> Tensor:
        return torch.tensor(list(text.encode()))

    def lengths(self, indices: Tensor) -> Tensor:
        return torch.ones_like(indices)


class Pairs:
    """Units are frequent sequences of bytes, at most ``size`` different ones, learned on a text."""

    def __init__(self, text: str, size: int) -> None:
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # every byte, so that no text is unknown
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet,
                                      show_progress=False)  # fmt: skip
        self.tokenizer.train_from_iterator([text], trainer)
        self.size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)

    def lengths(self, indices: Tensor) -> Tensor:
        """How many bytes each unit stands for: its spelling has a letter for every byte."""
        units = [len(self.tokenizer.id_to_token(j)) for j in range(self.size)]
        return torch.tensor(units)[indices]


class Model(nn.Module):
    """Units ``(T, B)`` and a state to logits ``(T, B, V)`` and the state after them.

    Args:
        embedding: numbers that a unit becomes; None: one-hot vectors, which are never built.
    """

    def __init__(self, size: int, embedding: int | None = None, hidden_size: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, embedding) if embedding else nn.Identity()
        self.lstm = fastlstm.LSTM(embedding or size, hidden_size)
        self.output = nn.Linear(hidden_size, size)

    def forward(self, units: Tensor, state=None):
        output, state = self.lstm(self.embedding(units), state)
        return self.output(output), state


def train(model: Model, units: Tensor, epochs: int) -> int:
    """Pass over the text, the state carried from window to window; the number of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    streams = units[: len(units) // BATCH * BATCH].view(BATCH, -1).t()
    steps = 0
    for _ in range(epochs):
        state = None
        for begin in range(0, len(streams) - STEPS - 1, STEPS):
            x, y = streams[begin : begin + STEPS], streams[begin + 1 : begin + STEPS + 1]
            logits, state = model(x, state)
            state = tuple(part.detach() for part in state)
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            steps += 1
    return steps


@torch.no_grad()
def bits_a_byte(model: Model, units: Tensor, lengths: Tensor) -> float:
    """The loss on a text, whose first unit is not predicted."""
    bits, state = 0.0, None
    for begin in range(0, len(units) - 1, 1000):
        window = units[begin : begin + 1001, None]
        logits, state = model(window[:-1], state)
        bits += F.cross_entropy(logits[:, 0], window[1:, 0], reduction="sum").item() / math.log(2)
    return bits / lengths[1:].sum().item()


def main(path: str = __file__, epochs: int = 2, sizes: tuple[int, ...] = (512, 2048)):
    """Print bits a byte on the end of a text: by the encoding, one-hot and with an embedding."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    cut = int(len(text) * (1 - HELD_OUT))
    results: dict[tuple[int, int | None], float] = {}
    for encoding in (Bytes(), *(Pairs(text[:cut], size) for size in sizes)):
        training, held_out = encoding.encode(text[:cut]), encoding.encode(text[cut:])
        lengths = encoding.lengths(held_out)
        for embedding in (None, 32):
            torch.manual_seed(0)
            model = Model(encoding.size, embedding)
            steps = train(model, training, epochs)
            bits = results[encoding.size, embedding] = bits_a_byte(model, held_out, lengths)
            front = f"{embedding} numbers" if embedding else "one-hot"
            print(f"{encoding.size:5} units, {front:10}: {bits:.3f} bits a byte, {steps:,} steps")
    return results


if __name__ == "__main__":
    main(*sys.argv[1:2])
