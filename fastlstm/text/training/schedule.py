"""The learning rate over a run."""

from __future__ import annotations

import math

from .options import Config


def learning_rate(config: Config, step: int, total: int, epoch: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then the schedule.

    Only ``cosine`` looks at the run's length ``total``: under the others a run that is made longer
    equals one that was that long from the start.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "cosine":
        done = (step - config.warmup) / max(1, total - config.warmup)
        return config.lr * (0.01 + 0.495 * (1 + math.cos(math.pi * min(done, 1.0))))
    if config.lr_schedule == "step":  # char-rnn's
        return config.lr * 0.97 ** max(0, epoch - 9)
    return config.lr
