"""gpu_check on single steps: what one more step of a layer costs each algorithm.

It is the difference of two calls that differ in their steps alone, so that neither launches nor the
loading of weights count. Input by index has no product; nor has backward, where the states alone
want gradients. What is left are the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastlstm

from ..accuracy import precision
from ..timing import events, interleaved, wall
from .checks import captured, refusal

# (hidden size, sequences) of a layer, and microseconds that the design asks for on an H200 in bf16:
# forward, keeping what backward needs, and backward.
TARGETS: dict[tuple[int, int], tuple[float | None, float | None]] = {
    (64, 128): (0.3, None),
    (128, 50): (None, None),
    (256, 16): (0.7, 0.65),
    (512, 56): (0.95, 1.1),
    (512, 100): (1.6, 1.7),
    (768, 16): (1.2, 2.0),
    (1024, 16): (None, None),
    (1024, 64): (2.8, None),
    (2048, 32): (None, None),
    (2048, 128): (None, None),
}
VOCABULARY = 32
STEPS = {"cuda": (64, 576), "cpu": (4, 12)}


def steps(
    hidden_size: int, batch: int, kind: str, algorithm: str, device: str, rounds: int
) -> dict[str, Any]:
    """A row of a layer and an algorithm: microseconds a step, as estimated, and the target."""
    row: dict[str, Any] = {
        "hidden_size": hidden_size, "batch": batch, "precision": kind, "algorithm": algorithm,
    }  # fmt: skip
    with precision(kind) as (dtype, _), fastlstm.algorithm(algorithm):
        lstm = fastlstm.LSTM(VOCABULARY, hidden_size, device=device, dtype=dtype)
        lstm.requires_grad_(False)
        short, long = STEPS[device]
        calls = {}
        try:
            for count in (short, long):
                forward, both = _calls(lstm, batch, count)
                for name, call in (("forward", forward), ("both", both)):
                    replay = captured(call)[0].replay if device == "cuda" else call
                    calls[f"{name}, {count} steps"] = replay
                    call()
        except (RuntimeError, ValueError) as error:
            reason = refusal(error)
            if reason is None:
                raise
            return {"rows": [row | {"refused": reason}]}
        clock = events if device == "cuda" else wall
        found = interleaved(calls, rounds, clock)
        planned = fastlstm.explain(lstm, batch, long)

    def step(name: str) -> float:  # in microseconds
        ends = [found[f"{name}, {count} steps"].median for count in (short, long)]
        return 1e6 * (ends[1] - ends[0]) / (long - short)

    targets = TARGETS[hidden_size, batch] if device == "cuda" and kind == "bf16" else (None, None)
    return {
        "rows": [
            row
            | {
                "forward": step("forward"),
                "forward_estimate": planned.step_microseconds,
                "forward_target": targets[0],
                "backward": step("both") - step("forward"),
                "backward_estimate": planned.backward_step_microseconds,
                "backward_target": targets[1],
            }
        ]
    }


def _calls(
    lstm: fastlstm.LSTM, batch: int, steps: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward for a backward that follows, and both."""
    weight = next(lstm.parameters())
    input = torch.randint(VOCABULARY, (steps, batch), device=weight.device)
    states = tuple(weight.new_zeros(1, batch, lstm.hidden_size).requires_grad_() for _ in range(2))
    arriving = weight.new_ones(steps, batch, lstm.hidden_size)

    def forward() -> torch.Tensor:
        return lstm(input, states)[0]

    return forward, lambda: torch.autograd.grad(forward(), states, arriving)
