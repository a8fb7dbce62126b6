"""What the characters of a model are: bytes, or code points of Unicode."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alphabet:
    """The characters that a model knows.

    Attributes:
        unit: "byte" or "char".
        vocabulary: byte values or code points, ascending; a character's index is its place here.
    """

    unit: str
    vocabulary: list[int]

    def encode(self, text: bytes) -> tuple[Tensor, int]:
        """The characters of UTF-8 that the model knows; to a byte model any bytes are a text.

        Returns:
            int64 ``(T, 1)`` vocabulary indices, and how many unknown characters were left out.
        """
        values = torch.tensor(self._values(text), dtype=torch.int64)
        vocabulary = torch.tensor(self.vocabulary)
        indices = torch.searchsorted(vocabulary, values).clamp(max=len(vocabulary) - 1)
        known = vocabulary[indices] == values
        return indices[known][:, None], int((~known).sum())

    def knows(self, text: bytes) -> bool:
        """Whether :meth:`encode` leaves nothing out."""
        return set(self._values(text)) <= set(self.vocabulary)

    def _values(self, text: bytes) -> list[int]:
        if self.unit == "byte":
            return list(text)
        return [ord(c) for c in text.decode("utf-8", errors="replace")]

    def start(self) -> Tensor:
        """int64 ``(1, 1)``, what a text without a primer begins after: a newline, if known."""
        return torch.tensor([[self.vocabulary.index(10) if 10 in self.vocabulary else 0]])

    def decode(self, indices: Sequence[int]) -> bytes | str:
        """The characters of vocabulary indices; bytes may end within a character of UTF-8."""
        values = [self.vocabulary[j] for j in indices]
        return bytes(values) if self.unit == "byte" else "".join(map(chr, values))

    def text(self, indices: Sequence[int]) -> str:
        """The text of vocabulary indices, bytes that are none replaced."""
        decoded = self.decode(indices)
        return decoded if isinstance(decoded, str) else decoded.decode("utf-8", errors="replace")

    @staticmethod
    def valid(unit: str, vocabulary: list[int]) -> bool:
        """Whether these can be an alphabet's."""
        limit = {"byte": 0x100, "char": 0x110000}.get(unit, 0)
        return (
            0 < len(vocabulary) <= limit
            and all(type(v) is int and 0 <= v < limit for v in vocabulary)
            and not any(0xD800 <= v < 0xE000 for v in vocabulary)
            and sorted(set(vocabulary)) == vocabulary
        )


class Decoder:
    """Bytes or characters to text as they come, up to a stop string."""

    def __init__(self, stop: str | None = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._held = stop, ""
        self.ended = False

    def feed(self, data: bytes | str, final: bool = False) -> str:
        """What can be shown now; the beginning of a character or of the stop string waits."""
        if self.ended:
            return ""
        self._held += data if isinstance(data, str) else self._decoder.decode(data, final)
        if self._stop and self._stop in self._held:
            self.ended = True
            return self._held.split(self._stop)[0]
        keep = 0 if final or not self._stop else len(self._stop) - 1
        cut = max(0, len(self._held) - keep)
        out, self._held = self._held[:cut], self._held[cut:]
        return out
