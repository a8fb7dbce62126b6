"""Text to train on: files, folders, globs, standard input, URLs and named corpora, as bytes."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import UserError

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMED = ("stdlib", "shakespeare")

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Written when this Python was built, and different on every machine.
_GENERATED = re.compile(r"config-.*|_sysconfigdata.*\.py|sitecustomize\.py|_sysconfig_vars.*")


@dataclass
class Corpus:
    """Bytes of text, the values that occur in them, and their checksum.

    Attributes:
        data: uint8 ``(N,)``, mapped from disk where the corpus is one file.
        vocabulary: the byte values that occur, ascending; a byte's index is its place here.
        sha256: of all the bytes.
    """

    data: np.ndarray
    vocabulary: list[int]
    sha256: str

    def __post_init__(self) -> None:
        self._index = np.zeros(256, dtype=np.int64)
        self._index[self.vocabulary] = np.arange(len(self.vocabulary))

    def indices(self, places: np.ndarray) -> Tensor:
        """int64 vocabulary indices of the bytes at these places, in their shape."""
        return torch.from_numpy(self._index[self.data[places]])


def load(specs: Sequence[str]) -> Corpus:
    """Read a corpus: the concatenation of everything that ``specs`` name.

    Raises:
        UserError: something is missing, too short, or not what its checksum says.
    """
    parts = [part for spec in specs for part in _parts(spec)]
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if data.size < 2:
        why = "is one byte long: there is nothing to predict" if data.size else "is empty"
        raise UserError(f"--data: the text of {' '.join(specs)} {why}")
    digest = hashlib.sha256()
    counts = np.zeros(256, dtype=np.int64)
    for begin in range(0, data.size, 1 << 24):  # in pieces, for a mapped file may exceed memory
        piece = np.ascontiguousarray(data[begin : begin + (1 << 24)])
        digest.update(piece.data)
        counts += np.bincount(piece, minlength=256)
    return Corpus(data, np.flatnonzero(counts).tolist(), digest.hexdigest())


def _parts(spec: str) -> list[np.ndarray]:
    if spec == "stdlib":
        return _stdlib()
    if spec == "shakespeare":
        return [_download(SHAKESPEARE_URL, SHAKESPEARE_SHA256)]
    if spec == "-":
        return [np.frombuffer(sys.stdin.buffer.read(), dtype=np.uint8)]
    if spec.startswith(("http://", "https://")):
        return [_download(spec, None)]
    path = Path(spec)
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
            if not files:
                raise UserError(f"--data: the folder {spec} holds no files")
        elif path.exists():
            files = [path]
        else:
            found = (Path(name) for name in glob.glob(spec, recursive=True))
            files = sorted(p for p in found if p.is_file())
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise UserError(f"--data: cannot read {spec[:80]!r}: {error}") from error
    if not files:
        raise UserError(
            f"--data: {spec!r} is no file, folder, glob that matches, URL or name of a corpus "
            f"({', '.join(NAMED)})"
        )
    return [_read(p) for p in files]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(path: Path) -> np.ndarray:
    try:
        if not path.is_file():  # a pipe or a device cannot be mapped
            return np.frombuffer(path.read_bytes(), dtype=np.uint8)
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise UserError(f"--data: cannot read {path}: {error.strerror}") from error


def _stdlib() -> list[np.ndarray]:
    """Source text of the running interpreter's standard library, in the order of its paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _LEFT_OUT and not _GENERATED.fullmatch(f)]
        found += [Path(folder) / name for name in names
                  if name.endswith(".py") and not _GENERATED.fullmatch(name)]  # fmt: skip
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    if not found:
        raise UserError("this Python has no source text of its standard library; give --data")
    return [_read(path) for path in found]


def _download(url: str, sha256: str | None) -> np.ndarray:
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        known = f"sha256:{sha256}" if sha256 else None
        name = pooch.retrieve(url, known, path=pooch.os_cache("fastlstm"))
    except Exception as error:  # pooch lets every kind of network error through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data: cannot fetch {url}: {reason}") from error
    return _read(Path(name))


class Streams:
    """A part of a corpus as ``batch`` contiguous streams, read in windows with their targets.

    Each row of the batch goes on in the next window where it stopped, so that a model's state can
    be carried over (truncated backpropagation through time).

    Args:
        begin, end: the part, as places in the corpus.
        batch, steps: size B and length T of a window.
        partial: whether a last window shorter than T counts.

    Attributes:
        windows: how many there are.
    """

    def __init__(
        self, corpus: Corpus, begin: int, end: int, batch: int, steps: int, partial: bool = False
    ) -> None:
        self.corpus, self.batch, self.steps = corpus, batch, steps
        self.length = max(0, end - begin - 1) // batch  # of a stream, its last target not counted
        self.windows = -(-self.length // steps) if partial else self.length // steps
        self._starts = begin + self.length * np.arange(batch)

    def window(self, j: int) -> tuple[Tensor, Tensor]:
        """Input and target of window j, int64 ``(T, B)`` each, views of one tensor."""
        steps = np.arange(j * self.steps, min((j + 1) * self.steps, self.length) + 1)
        both = self.corpus.indices(steps[:, None] + self._starts)
        return both[:-1], both[1:]


def slug(specs: Sequence[str]) -> str:
    """A short name for a corpus, fit for a folder."""
    name = Path(specs[0].rstrip("/*")).stem if specs[0] != "-" else "stdin"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "text"
