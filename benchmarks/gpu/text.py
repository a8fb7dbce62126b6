"""gpu_check on text: whether it is the CPU's and the same in repeats, and how fast it comes.

Beside ``fastlstm.generate`` a loop over ``nn.LSTM`` that draws on the GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.generation.draw import Draw
from fastlstm.generation.generate import packs, run

from ..cases import KARPATHY
from ..timing import events, interleaved, wall

# Characters a second that the design asks for on an H200, 2x512 in bf16.
TARGETS = {("bf16", 1): 250e3, ("bf16", 64): 6e6}
SEED = torch.tensor([2024])
LOOP_LENGTH = 100  # the loop takes as long for every character


def text(weights: str, batch: int, device: str, length: int, rounds: int) -> dict[str, Any]:
    """A row for one kind of weights and one batch."""
    torch.manual_seed(0)
    vocabulary, hidden = KARPATHY.input_size, 512 if device == "cuda" else 64
    lstm, decoder = fastlstm.LSTM(vocabulary, hidden, 2), nn.Linear(hidden, vocabulary)
    with torch.no_grad():
        for p in (*lstm.parameters(), *decoder.parameters()):
            p.mul_(2)  # or every text would be noise
    prime, how = torch.randint(vocabulary, (8, batch)), Draw(1.0, seed=SEED)
    name, failed = f"{weights}, batch {batch}", []
    expected, _ = run(fastlstm.prepack(lstm, decoder), None, prime, 50, None, how)

    lstm, decoder, prime = lstm.to(device), decoder.to(device), prime.to(device)
    if not packs(lstm, decoder, weights):
        return {"skipped": [f"{name}: no native text on this GPU"]}
    packed = fastlstm.prepack(lstm, decoder, weights)
    first, states = run(packed, None, prime, length, None, how)
    same = float((first[:50].cpu() == expected).all(0).float().mean())
    if weights == "fp32" and same < 1 - 1 / batch:  # rounding may part one row of many
        failed.append(f"{name}: {1 - same:.0%} of the rows are not the CPU's text")
    for repeat in range(3):
        again, ends = run(packed, None, prime, length, None, how)
        if not all(
            torch.equal(a, b) for a, b in zip((first, *states), (again, *ends), strict=True)
        ):
            failed.append(f"{name}: other bits in repeat {repeat}")
            break

    theirs: Any = fastlstm.to_torch(lstm, copy=True)
    calls: dict[str, Any] = {
        "fastlstm": partial(run, packed, None, prime, length, None, how),
        "loop": partial(loop, theirs, decoder, prime[-1:], min(length, LOOP_LENGTH)),
    }
    found = interleaved(calls, rounds, events if device == "cuda" else wall)
    rate = length * batch / found["fastlstm"].median
    return {
        "rows": [
            {
                "weights": weights,
                "batch": batch,
                "length": length,
                "characters_per_second": rate,
                "loop_characters_per_second": min(length, LOOP_LENGTH) * batch
                / found["loop"].median,
                "rows_like_the_cpus": same,
                "target": TARGETS.get((weights, batch)) if device == "cuda" else None,
            }
        ],
        "failed": failed,
    }  # fmt: skip


@torch.inference_mode()
def loop(lstm: nn.LSTM, decoder: nn.Linear, token: Tensor, length: int) -> Tensor:
    """Text by nn.LSTM, a call a step, drawn by torch."""
    drawn, hx = [], None
    for _ in range(length):
        one_hot = nn.functional.one_hot(token, lstm.input_size).to(decoder.weight.dtype)
        y, hx = lstm(one_hot, hx)
        token = torch.multinomial(decoder(y[0]).softmax(-1), 1).t()
        drawn.append(token)
    return torch.cat(drawn)
