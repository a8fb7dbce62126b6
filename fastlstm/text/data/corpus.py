"""Text to train on, however many files it comes from, and the windows that walk over it.

However large, a text is mapped from the disk and not held in memory: a large file itself, or else a
copy of all.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..alphabet import UNITS, Alphabet, Tokens
from .sources import sources
from .stdin import standard_input

PIECE = 1 << 22  # bytes that are held at a time
COUNTED = 1 << 24  # characters are enough to know how often each occurs
LARGE = 1 << 26  # bytes of a file that is not copied


@dataclass
class Corpus:
    """The characters of a text, the values that occur in it, and its checksum.

    Attributes:
        data: ``(N,)``, mapped from disk: bytes as uint8, code points as uint32, or tokens as
            uint16.
        occurring: the values that occur, ascending.
        sha256: of the text's bytes.
        vocabulary: all values that a model of it knows, ascending; a character's index is its
            place here. Every byte, so that a model of bytes reads any text, or ``occurring``.
        summary: what was read and what was left out, in one sentence.
        tokens: what ``data`` counts in, where it holds tokens and neither bytes nor code points.
        held_out: of such a text the tokens to validate on and to test on.
    """

    data: np.ndarray
    occurring: list[int]
    sha256: str
    summary: str = ""
    tokens: Tokens | None = None
    held_out: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.tokens is not None:
            self.read_as(self.tokens.vocabulary)
        else:
            self.read_as(list(range(256)) if self.data.dtype == np.uint8 else self.occurring)

    @property
    def alphabet(self) -> Alphabet:
        """What turns text into indices of the vocabulary, and back."""
        unit = "byte" if self.data.dtype == np.uint8 else "char"
        return self.tokens or Alphabet(unit, self.vocabulary)

    def tails(self, val_fraction: float, test_fraction: float) -> tuple[int, int]:
        """How many at the end of the data are to validate on and to test on."""
        size = len(self.data)
        return self.held_out if self.tokens else (
            int(size * val_fraction), int(size * test_fraction)
        )  # fmt: skip

    def read_as(self, vocabulary: list[int]) -> None:
        """Use another vocabulary, ascending, that holds all values that occur."""
        self.vocabulary = vocabulary
        self._index = np.zeros(vocabulary[-1] + 1, dtype=np.int64)
        self._index[vocabulary] = np.arange(len(vocabulary))

    def indices(self, places: np.ndarray) -> Tensor:
        """int64 vocabulary indices of the characters at these places, in their shape."""
        return torch.from_numpy(self._index[self.data[places]])

    def counts(self, end: int) -> Tensor:
        """int64 ``(V,)``: how often each of the vocabulary occurs before the place ``end``.

        Of a long text only the beginning is counted.
        """
        counts = np.zeros(len(self.vocabulary), dtype=np.int64)
        end = min(end, COUNTED)
        for begin in range(0, end, PIECE):
            piece = self._index[self.data[begin : min(begin + PIECE, end)]]
            counts += np.bincount(piece, minlength=len(counts))
        return torch.from_numpy(counts)


def load(specs: Sequence[str], unit: str = "byte", stdin: Path | None = None) -> Corpus:
    """Read a corpus: the concatenation of everything that ``specs`` name.

    Args:
        unit: "byte", or "char" for the characters of UTF-8; what is none becomes U+FFFD.
        stdin: a file that holds what came from standard input, which is read where there is none.

    Raises:
        UserError: something is missing, too short, or not what its checksum says.
    """
    named = sources(specs)
    files = [file or stdin for file in named.files]
    digest, size = hashlib.sha256(), 0
    seen = np.zeros(256 if unit == "byte" else 0x110000, dtype=bool)

    def characters() -> Iterator[np.ndarray]:
        nonlocal size
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in itertools.chain(_pieces(files), [b""]):
            digest.update(piece)
            size += len(piece)
            if unit == "byte":
                values = np.frombuffer(piece, dtype=np.uint8)
            else:
                text = decoder.decode(piece, final=not piece)
                values = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            seen[values] = True
            yield values

    if unit == "byte" and len(files) == 1 and files[0] is not None and _large(files[0]):
        for _ in characters():
            pass
        data: np.ndarray = np.memmap(files[0], dtype=np.uint8, mode="r")
    else:
        data = spooled(characters())
    if data.size < 2:
        why = f"is one {UNITS[unit].each} long: nothing to predict" if data.size else "is empty"
        raise UserError(f"--data: the text of {' '.join(specs)} {why}")
    vocabulary = np.flatnonzero(seen).tolist()
    return Corpus(data, vocabulary, digest.hexdigest(), named.summary(size))


def _pieces(files: Sequence[Path | None]) -> Iterator[bytes]:
    """All the bytes, in pieces that memory holds."""
    for source in files:
        try:
            with open(source, "rb") if source else nullcontext(standard_input("--data -")) as file:
                while piece := file.read(PIECE):
                    yield piece
        except OSError as error:
            name = source or "standard input"
            raise UserError(f"--data: cannot read {name}: {error.strerror}") from error


def _large(path: Path) -> bool:
    """Whether a file is mapped as it is; of a smaller one a copy is, which no editor changes."""
    return path.is_file() and path.stat().st_size >= LARGE


def spooled(parts: Iterator[np.ndarray]) -> np.ndarray:
    """The parts one after another in a temporary file that has no name and goes with the run."""
    where, dtype = tempfile.gettempdir(), np.dtype(np.uint8)
    try:
        with tempfile.TemporaryFile() as file:
            for part in parts:
                file.write(part.data)
                dtype = part.dtype
            file.flush()
            return np.memmap(file, dtype=dtype, mode="r") if file.tell() else np.zeros(0, dtype)
    except OSError as error:
        raise UserError(
            f"--data: cannot write to {where}: {error.strerror}; TMPDIR names another folder"
        ) from error


class Streams:
    """A part of a corpus as ``batch`` contiguous streams, read in windows with their targets.

    Each row of the batch goes on in the next window where it stopped, so that a model's state can
    be carried over (truncated backpropagation through time).

    Args:
        begin, end: the part, as places in the corpus.
        batch, steps: size B and length T of a window.
        partial: whether a last window shorter than T counts.
        rank, world: of ``world`` processes that share the rows, this one reads part ``rank``.

    Attributes:
        windows: how many there are.
        rows: the streams that this process reads, of B.
    """

    def __init__(
        self,
        corpus: Corpus,
        begin: int,
        end: int,
        batch: int,
        steps: int,
        partial: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.corpus, self.batch, self.steps = corpus, batch, steps
        self._begin, self.end = begin, end
        self.length = max(0, end - begin - 1) // batch  # of a stream, its last target not counted
        self.windows = -(-self.length // steps) if partial else self.length // steps
        self.rows = slice(rank * batch // world, (rank + 1) * batch // world)
        self._starts = begin + self.length * np.arange(batch)[self.rows]

    @functools.cached_property
    def bytes_each(self) -> float:
        """How many bytes a target of all processes has, on average; of many, the first ones."""
        if self.corpus.data.dtype == np.uint8:
            return 1.0
        sizes, total, count = self.corpus.alphabet.sizes, 0, 0
        last = min(self.windows * self.steps, self.length)  # target of a stream
        for row in range(self.batch):
            for begin in range(row * self.length, row * self.length + last, PIECE):
                end = min(begin + PIECE, row * self.length + last)
                places = np.arange(begin, end) + self._begin + 1
                total += int(sizes[self.corpus.indices(places)].sum())
                count += len(places)
            if count >= COUNTED:
                break
        return total / max(count, 1)

    def window(self, j: int) -> tuple[Tensor, Tensor]:
        """Input and target of window j, int64 ``(T, rows)`` each, views of one tensor."""
        steps = np.arange(j * self.steps, min((j + 1) * self.steps, self.length) + 1)
        both = self.corpus.indices(steps[:, None] + self._starts)
        return both[:-1], both[1:]


def slug(specs: Sequence[str]) -> str:
    """A short name for a corpus, fit for a folder."""
    name = Path(specs[0].rstrip("/*")).stem if specs[0] != "-" else "stdin"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "text"
