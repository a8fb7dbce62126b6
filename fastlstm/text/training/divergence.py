"""When a run's loss shows that it no longer learns."""

from __future__ import annotations

import math

from torch import nn

# Nats above a guess among all characters. Runs with Adam and RMSprop at learning rates from 0.01 to
# 100 decide it: those that learned never rose above 15 nats, and those that rose above a hundred
# learned at best how often each character occurs.
MARGIN = 100.0


class DivergedError(Exception):
    """A loss or gradient that is no number to learn from, or a loss far above a guess's."""


def check(what: str, nats: float, vocabulary: int, finite: bool = True) -> None:
    """Raise DivergedError for a loss from which no run comes back.

    Args:
        what: names the loss in the message.
        nats: the loss.
        vocabulary: number of different characters.
        finite: whether all else that was computed with it is.
    """
    if not (math.isfinite(nats) and finite):
        raise DivergedError(f"{what} is no number to learn from")
    guess = math.log(vocabulary)
    if nats > guess + MARGIN:
        raise DivergedError(f"{what} is far above the {guess:.2f} nats of a blind guess")


def check_weights(model: nn.Module, step: int) -> None:
    """Raise DivergedError where a parameter is no finite number after that step."""
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise DivergedError(f"a weight after step {step:,} is no finite number")
