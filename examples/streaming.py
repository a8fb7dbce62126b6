"""Speech as it comes: a chunk of frames at a time, the state carried from call to call.

Run it: ``python examples/streaming.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import fastlstm

FEATURES, SYMBOLS = 80, 32  # mel bands of a frame of 10 ms; what a frame may be


class Recogniser(nn.Module):
    """Frames ``(T, B, 80)`` and a state to logits ``(T, B, 32)`` and the state after them."""

    def __init__(self, hidden_size: int = 256, num_layers: int = 3) -> None:
        super().__init__()
        self.encoder = fastlstm.LSTM(FEATURES, hidden_size, num_layers)
        self.classifier = nn.Linear(hidden_size, SYMBOLS)

    def forward(self, frames: Tensor, state=None):
        output, state = self.encoder(frames, state)
        return self.classifier(output), state


@torch.inference_mode()
def recognise(model: Recogniser, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the logits of every chunk as soon as it is there."""
    state = None
    for frames in chunks:
        logits, state = model(frames, state)
        yield logits


def main(seconds: float = 5.0, frames_a_chunk: int = 10) -> float:
    """Recognise noise, and return how much of the time that it lasts the model works."""
    torch.manual_seed(0)
    model = Recogniser().eval()
    speech = torch.randn(round(100 * seconds), 1, FEATURES)
    begun = time.perf_counter()
    symbols = [logits.argmax(-1) for logits in recognise(model, speech.split(frames_a_chunk))]
    share = (time.perf_counter() - begun) / seconds
    print(
        f"{len(torch.cat(symbols))} frames in chunks of {frames_a_chunk}: {share:.1%} of real time"
    )
    return share


if __name__ == "__main__":
    main()
