"""What pages and loss.png show a run's losses in."""

from __future__ import annotations

import math
from dataclasses import dataclass

LN2 = math.log(2)


@dataclass(frozen=True)
class Scale:
    """Nats a character, or bits a byte of text, in which runs of different units compare.

    Attributes:
        label: of an axis.
        each: what the run reads, one at a time.
        train, val: what losses in nats are multiplied by, on the text to train and to validate on.
    """

    label: str = "nats a character"
    each: str = "character"
    train: float = 1.0
    val: float = 1.0

    @property
    def in_bytes(self) -> bool:
        return self.label == "bits a byte"


NATS = Scale()


def bits_a_byte(each: str, train: float, val: float) -> Scale:
    """That of a run with so many bytes a character or token, on average."""
    return Scale("bits a byte", each, 1 / (LN2 * train), 1 / (LN2 * val))
