"""Text to train on: files, folders, globs, standard input, URLs and named corpora, as bytes."""

from __future__ import annotations

import glob
import hashlib
import os
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

    def indices(self, begin: int, end: int) -> Tensor:
        """int64 vocabulary indices of bytes ``[begin, end)``."""
        table = np.zeros(256, dtype=np.int64)
        table[self.vocabulary] = np.arange(len(self.vocabulary))
        return torch.from_numpy(table[self.data[begin:end]])


def load(specs: Sequence[str]) -> Corpus:
    """Read a corpus: the concatenation of everything that ``specs`` name.

    Raises:
        UserError: something is missing, empty, or not what its checksum says.
    """
    parts = [part for spec in specs for part in _parts(spec)]
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if data.size == 0:
        raise UserError(f"the corpus {' '.join(specs)} is empty")
    if data.size == 1:
        raise UserError(f"the corpus {' '.join(specs)} is one byte long; nothing can be predicted")
    digest = hashlib.sha256()
    counts = np.zeros(256, dtype=np.int64)
    for begin in range(0, data.size, 1 << 24):  # in pieces, for mapped files may exceed memory
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
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
        if not files:
            raise UserError(f"--data: the folder {spec} holds no files")
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(spec, recursive=True))
        files = [p for p in files if p.is_file()]
        if not files:
            names = ", ".join(NAMED)
            raise UserError(
                f"--data: {spec!r} is no file, folder, glob with a match, URL or corpus ({names})"
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
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    if not found:
        raise UserError("this Python has no source text of its standard library; give --data")
    return [_read(path) for path in found]


def _download(url: str, sha256: str | None) -> np.ndarray:
    import pooch

    try:
        name = pooch.retrieve(
            url, f"sha256:{sha256}" if sha256 else None, path=pooch.os_cache("fastlstm")
        )
    except Exception as error:  # pooch lets every kind of network error through
        raise UserError(f"--data: cannot fetch {url}: {str(error).splitlines()[0]}") from error
    return _read(Path(name))


class Streams:
    """A split as ``batch`` contiguous streams, read in windows of ``steps`` with their targets.

    Each row of the batch goes on in the next window where it stopped, so that a model's state can
    be carried over (truncated backpropagation through time).
    """

    def __init__(self, corpus: Corpus, begin: int, end: int, batch: int, steps: int) -> None:
        self.corpus, self.begin, self.batch, self.steps = corpus, begin, batch, steps
        self.length = (end - begin - 1) // batch  # of a stream, one byte more being a target
        self.windows = self.length // steps

    def window(self, j: int) -> tuple[Tensor, Tensor]:
        """Input and target of window j, int64 ``(steps, batch)`` each."""
        rows = []
        for b in range(self.batch):
            start = self.begin + b * self.length + j * self.steps
            rows.append(self.corpus.indices(start, start + self.steps + 1))
        both = torch.stack(rows, dim=1)
        return both[:-1], both[1:]
