"""The parts of a text: to train on, to validate on, to test on."""

from __future__ import annotations

from .. import UserError
from ..alphabet import UNITS
from ..data.corpus import Corpus, Streams
from .options import Config
from .team import Team

EVAL_STREAMS = 64  # many, so that evaluating is fast
EVAL_CHARACTERS = 1 << 17  # spread over the whole held-out tail; more would cost minutes of a run


def split(corpus: Corpus, config: Config, explicit: set[str], team: Team) -> dict[str, Streams]:
    """Training, validation and test streams; a default batch shrinks to fit a short text.

    Raises:
        UserError: there is too little text for one batch, or for a part that was asked for, or
            the team cannot share a batch evenly.
    """
    size, steps, share = len(corpus.data), config.seq_length, (team.rank, team.size)
    unit = UNITS[config.unit]
    val, test = corpus.tails(config.val_fraction, config.test_fraction)
    train = size - val - test
    if "batch_size" not in explicit:
        fitting = min(config.batch_size, (train - 1) // steps)
        config.batch_size = max(1, fitting // team.size) * team.size
    if config.batch_size % team.size:
        raise UserError(
            f"--batch-size {config.batch_size}: {team.size} processes cannot share it evenly"
        )
    needed = config.batch_size * steps + 1
    if train < needed:
        smaller = (
            "--batch-size or --seq-length" if config.batch_size > team.size else "--seq-length"
        )
        raise UserError(
            f"the text is shorter than one batch: {config.batch_size} x {steps} {unit.each}s "
            f"(--batch-size x --seq-length) need {needed} {unit.name}s to train on, there are "
            f"{train}; give more text or a smaller {smaller}"
        )
    streams = {"train": Streams(corpus, 0, train, config.batch_size, steps, False, *share)}
    for name, begin, length in (("val", train, val), ("test", train + val, test)):
        if length < 2:
            if f"{name}_fraction" in explicit and getattr(config, f"{name}_fraction") > 0:
                raise UserError(
                    f"--{name}-fraction leaves {length} {unit.name}s of the text: too few"
                )
            continue
        batch = max(1, min(EVAL_STREAMS, (length - 1) // steps))
        streams[name] = Streams(corpus, begin, begin + length, batch, steps, True, *share)
    if "val" not in streams and "patience" in explicit and config.patience:
        raise UserError(
            f"--patience {config.patience}: there is no text to validate on; expected more text or "
            "a larger --val-fraction"
        )
    if "val" in streams:
        few = max(1, EVAL_CHARACTERS // (streams["val"].batch * steps))
        streams["val"].windows = min(streams["val"].windows, few)
    return streams
