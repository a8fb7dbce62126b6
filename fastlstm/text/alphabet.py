"""What the characters of a model are: bytes, code points of Unicode, or tokens of several bytes."""

from __future__ import annotations

import codecs
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unit:
    """What a text is counted in.

    Attributes:
        name: of one, in what is said of a text.
        each: of one, in what is said of a loss.
        short: of several, in what is said of speed.
        per: behind nats, in the trainer's lines.
        bits: what those lines show beside nats.
    """

    name: str
    each: str
    short: str
    per: str
    bits: str

    @property
    def in_bytes(self) -> bool:
        """Whether losses are shown in bits a byte, for they mean little by the unit itself."""
        return self.each == "token"


UNITS = {
    "byte": Unit("byte", "character", "chars", "", "bpc"),
    "char": Unit("char", "character", "chars", "", "bpc"),
    "bpe": Unit("token", "token", "tokens", " a token", "bits a byte"),
}


@dataclass(frozen=True)
class Alphabet:
    """The characters that a model knows.

    Attributes:
        unit: "byte" or "char".
        vocabulary: byte values or code points, ascending; a character's index is its place here.
    """

    unit: str
    vocabulary: list[int]

    @staticmethod
    def of(meta: dict[str, Any]) -> Alphabet:
        """That of a checkpoint, as its ``meta`` describes it."""
        if meta["unit"] == "bpe":
            return Tokens(meta["unit"], meta["vocabulary"], meta["merges"])
        return Alphabet(meta["unit"], meta["vocabulary"])

    def described(self) -> dict[str, Any]:
        """What :meth:`of` takes."""
        return {"unit": self.unit, "vocabulary": self.vocabulary}

    @functools.cached_property
    def sizes(self) -> Tensor:
        """int64 ``(V,)``: how many bytes of UTF-8 each of the vocabulary stands for."""
        return torch.tensor([len(chr(v).encode()) if self.unit == "char" else 1
                             for v in self.vocabulary])  # fmt: skip

    def bits_a_byte(self, nats: float, indices: Tensor) -> float:
        """The mean loss of these in bits a byte of text, which all units have.

        Args:
            nats: their mean loss.
            indices: int64, of the vocabulary.
        """
        size = int(self.sizes[indices.cpu()].sum())
        return nats * indices.numel() / (math.log(2) * size)

    def name(self, index: int) -> str:
        """One of the vocabulary by a name that can be seen."""
        return _name(self.vocabulary[index], 128 if self.unit == "byte" else 0x110000)

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

    def prime(self, primer: bytes) -> tuple[Tensor, int]:
        """What :meth:`encode` gives; where nothing of it is known, :meth:`start`."""
        indices, unknown = self.encode(primer)
        return (indices if len(indices) else self.start()), unknown

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
    def valid(meta: dict[str, Any]) -> bool:
        """Whether ``meta`` describes an alphabet."""
        unit, vocabulary = meta["unit"], meta["vocabulary"]
        if unit == "bpe":
            return Tokens.valid(meta)
        limit = {"byte": 0x100, "char": 0x110000}.get(unit, 0)
        return (
            0 < len(vocabulary) <= limit
            and all(type(v) is int and 0 <= v < limit for v in vocabulary)
            and not any(0xD800 <= v < 0xE000 for v in vocabulary)
            and sorted(set(vocabulary)) == vocabulary
        )


LONGEST = 64  # bytes of a word, and so of a token
PART = 1 << 20  # bytes that are encoded at a time
_BLANK = r" \t\r\x0b\x0c"
# What tokens lie within: a word with the space before it, digits, punctuation, the rest of a line.
# Whatever is no ASCII counts as letters. It reads the same to Python and to `tokenizers`.
WORDS = (
    r" ?[^\x00-@\[-`{-\x7f]{1,63}| ?[0-9]{1,63}| ?[\x00-\x08\x0e-\x1f!-/:-@\[-`{-\x7f]{1,63}"
    rf"|[{_BLANK}]{{0,63}}\n|[{_BLANK}]{{1,63}}(?![^{_BLANK}\n])|[{_BLANK}]{{1,63}}"
)
_WORDS = re.compile(WORDS.encode())


@dataclass(frozen=True)
class Tokens(Alphabet):
    """Tokens of byte-level BPE (Sennrich et al., 2016): the 256 bytes, and what was merged of them.

    Every byte is a token, so nothing is unknown. A newline ends the word that it stands in, so that
    a text can be encoded line by line.

    Attributes:
        vocabulary: 0, 1, 2, ...: the numbers of the tokens, the bytes first.
        merges: pairs of tokens, the first learned one first. Each makes the next token, unless
            there is one of the same bytes.
    """

    merges: list[list[int]] = field(default_factory=list)

    @staticmethod
    def learned(merges: list[list[int]]) -> Tokens:
        """The alphabet of these merges."""
        return Tokens("bpe", list(range(len(_spelled(merges)))), merges)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "merges": self.merges}

    @functools.cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of every token."""
        return _spelled(self.merges)

    @functools.cached_property
    def sizes(self) -> Tensor:
        return torch.tensor([len(token) for token in self.tokens])

    def name(self, index: int) -> str:
        token = self.tokens[index]
        if len(token) == 1:
            return _name(token[0], 128)
        try:
            text = token.decode().translate({9: "\u21e5", 10: "\u21b5", 32: "\u2423"})
        except UnicodeDecodeError:
            text = ""
        return text if text.isprintable() and text else "0x" + token.hex().upper()

    def encode(self, text: bytes) -> tuple[Tensor, int]:
        parts = [self.numbers(part) for part in parts_of([text])]
        return torch.tensor([j for part in parts for j in part], dtype=torch.int64)[:, None], 0

    def numbers(self, part: bytes) -> list[int]:
        """The tokens of one of :func:`parts_of`."""
        found: list[int] = []
        known = self._known
        for word in _WORDS.findall(part):
            numbers = known.get(word)
            if numbers is None:
                if len(known) >= 1 << 20:  # of a text without end
                    known.clear()
                numbers = known[word] = self._merged(word)
            found += numbers
        return found

    def knows(self, text: bytes) -> bool:
        return True

    def decode(self, indices: Sequence[int]) -> bytes:
        return b"".join(self.tokens[j] for j in indices)

    @staticmethod
    def valid(meta: dict[str, Any]) -> bool:
        merges = meta.get("merges")
        if not (isinstance(merges, list) and len(merges) < 1 << 17):
            return False
        tokens = [1] * 256  # their lengths; a merge may make none, so these are at least as many
        for pair in merges:
            if not (isinstance(pair, list) and len(pair) == 2
                    and all(type(j) is int and 0 <= j < len(tokens) for j in pair)):  # fmt: skip
                return False
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            if tokens[-1] > LONGEST:
                return False
        try:
            return meta["vocabulary"] == list(range(len(_spelled(merges))))
        except IndexError:
            return False

    @functools.cached_property
    def _known(self) -> dict[bytes, list[int]]:
        """Words whose tokens were looked for before."""
        return {}

    @functools.cached_property
    def _ranks(self) -> dict[tuple[int, int], tuple[int, int]]:
        """By pair its place among the merges and the token that it makes."""
        numbers = {token: j for j, token in enumerate(self.tokens)}
        return {(a, b): (rank, numbers[self.tokens[a] + self.tokens[b]])
                for rank, (a, b) in enumerate(self.merges)}  # fmt: skip

    def _merged(self, word: bytes) -> list[int]:
        """The tokens of a word: of the pairs in it, the one that was learned first is merged."""
        numbers = list(word)
        while True:
            pairs = [(*self._ranks[pair], j) for j, pair in enumerate(itertools.pairwise(numbers))
                     if pair in self._ranks]  # fmt: skip
            if not pairs:
                return numbers
            _, token, j = min(pairs)
            numbers[j : j + 2] = [token]


def parts_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A text in parts that end with a line, or, where a line is longer than a part, within it.

    The parts do not depend on the pieces.
    """
    rest = b""
    for piece in pieces:
        rest += piece
        while len(rest) >= PART:
            cut = rest.rfind(b"\n", 0, PART) + 1 or PART
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _spelled(merges: list[list[int]]) -> list[bytes]:
    """The bytes of every token."""
    tokens = [bytes([value]) for value in range(256)]
    known = set(tokens)
    for a, b in merges:
        token = tokens[a] + tokens[b]
        if token not in known:
            known.add(token)
            tokens.append(token)
    return tokens


def _name(value: int, limit: int) -> str:
    """A byte or a code point by a name that can be seen, as itself where it is below the limit."""
    named = {10: "newline", 32: "space", 9: "tab", 13: "carriage return"}
    if value in named:
        return named[value]
    return chr(value) if value < limit and chr(value).isprintable() else f"0x{value:02X}"


def note_of_unknown(unknown: int, unit: str) -> str:
    """That so many characters of a text were left out."""
    noun = ("byte" if unit == "byte" else "character") + "s" * (unknown > 1)
    return f"the model has never seen {unknown:,} {noun}: skipped"


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
