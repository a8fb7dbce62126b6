"""The character-level model: a recurrent stack on one-hot characters, and a linear decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import LSTM

CELLS = ("lstm", "torch-lstm", "gru", "rnn")


class CharModel(nn.Module):
    """Predicts the next character, as char-rnn does.

    Args:
        vocabulary: number of different characters, the width of input and output.
        cell: ``lstm`` for ``fastlstm.LSTM``, which takes the indices as they are; the others are
            torch's own modules on one-hot vectors.
        dropout: after every layer, the last included.
    """

    def __init__(
        self, vocabulary: int, cell: str, hidden_size: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.vocabulary, self.one_hot = vocabulary, cell != "lstm"
        kind: Any = {"lstm": LSTM, "torch-lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell]
        between = dropout if num_layers > 1 else 0.0
        self.rnn = kind(vocabulary, hidden_size, num_layers, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden_size, vocabulary)

    def forward(self, indices: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """int64 ``(T, B)`` to logits ``(T, B, V)``, and the state after the last step."""
        x = indices
        if self.one_hot:
            x = F.one_hot(indices, self.vocabulary).to(self.decoder.weight.dtype)
        output, hx = self.rnn(x, hx)
        return self.decoder(self.dropout(output)), hx


def states(hx: Any) -> list[Tensor]:
    """The tensors of a state: one for gru and rnn, two for an LSTM, none for None."""
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


def as_state(tensors: list[Tensor]) -> Any:
    """The state that :func:`states` took apart."""
    return None if not tensors else tensors[0] if len(tensors) == 1 else tuple(tensors)


def detached(hx: Any) -> Any:
    return as_state([x.detach() for x in states(hx)])


def loss_nats(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats a character."""
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


@torch.no_grad()
def evaluate(model: CharModel, streams: Any, device: torch.device) -> float:
    """Mean loss in nats over a split, with the split's own carried state; training mode is kept."""
    training = model.training
    model.eval()
    total, hx = 0.0, None
    for j in range(streams.windows):
        x, y = streams.window(j)
        logits, hx = model(x.to(device), hx)
        total += loss_nats(logits, y.to(device)).item()
    model.train(training)
    return total / streams.windows
