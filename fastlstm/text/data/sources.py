"""The files that ``--data`` names, and which files a folder or a glob leaves out."""

from __future__ import annotations

import glob
import os
import re
import shlex
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import UserError
from ..cli import suggestion
from .downloads import download

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMED = ("stdlib", "shakespeare")

_PROBED = 8000  # bytes; a zero among them marks a binary file, as for git
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Generated when this Python was built: other text on every machine.
_GENERATED = re.compile(r"config-.*|_sysconfigdata.*\.py|sitecustomize\.py|_sysconfig_vars.*")


@dataclass
class Sources:
    """Where a text comes from.

    Attributes:
        files: in the order in which they are read; None is standard input.
        left_out: how many files and folders a folder or a glob left out, by their kind.
    """

    files: list[Path | None] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def summary(self, size: int) -> str:
        """What was read and what was left out, in one sentence.

        Args:
            size: bytes that were read.
        """
        names = sum(file is not None for file in self.files)
        parts = [_counted(names, "file")] if names else []
        parts += ["standard input"] if None in self.files else []
        read = f"read {' and '.join(parts)}, {_counted(size, 'byte')}"
        return f"{read}; {self._omitted()}" if self.left_out else read

    def _omitted(self) -> str:
        counts = ", ".join(_counted(n, kind) for kind, n in sorted(self.left_out.items()))
        return f"left out {counts} (--data reads each of them by its name)"


def sources(specs: Sequence[str]) -> Sources:
    """The files that specs name, downloaded if need be.

    Raises:
        UserError: a spec names nothing that can be read.
    """
    result = Sources()
    for spec in specs:
        result.files += _files(spec, result)
    return result


def _files(spec: str, result: Sources) -> Sequence[Path | None]:
    if spec == "stdlib":
        return _stdlib()
    if spec == "shakespeare":
        return [download(SHAKESPEARE_URL, SHAKESPEARE_SHA256)]
    if spec == "-":
        return [None]
    if spec.startswith(("http://", "https://")):
        return [download(spec, None)]
    path, left_out = Path(spec), Counter[str]()
    try:
        if path.is_dir():
            matches = sorted(_text_files(_walk(path, left_out), left_out))
        elif path.is_fifo():
            raise UserError(
                f"--data: {spec} is a pipe, which cannot be read a second time; standard input, "
                f"which a run keeps, is read by: --data - < {shlex.quote(spec)}"
            )
        elif path.exists():
            return [path]
        else:
            matches = sorted(_text_files(_matches(spec, left_out), left_out))
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise UserError(f"--data: cannot read {spec[:80]!r}: {error}") from error
    left_out = +left_out  # drops counts of 0
    result.left_out += left_out
    if not matches and left_out:
        raise UserError(f"--data: {spec} holds no text: {Sources([], left_out)._omitted()}")
    if not matches and path.is_dir():
        raise UserError(f"--data: the folder {spec} holds no files")
    if not matches:
        raise UserError(
            f"--data: {spec!r} is no file, folder, glob that matches, URL or name of a corpus "
            f"({', '.join(NAMED)}){suggestion(spec, NAMED)}"
        )
    return matches


def _walk(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The files below a folder, but for what is hidden and what the trainer wrote."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        here = Path(folder)
        hidden = [name for name in folders + names if name.startswith(".")]
        left_out["hidden path"] += len(hidden)
        runs = [name for name in folders if name not in hidden and _is_run(here / name)]
        left_out["run folder"] += len(runs)
        folders[:] = [name for name in folders if name not in {*hidden, *runs}]
        left_out["linked folder"] += sum((here / name).is_symlink() for name in folders)
        yield from (here / name for name in names if not name.startswith("."))


def _matches(pattern: str, left_out: Counter[str]) -> Iterator[Path]:
    """The files that match a glob, but for those in runs that the pattern does not spell out."""
    spelled = 0
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        spelled += 1
    runs: dict[Path, bool] = {}
    for path in map(Path, glob.glob(pattern, recursive=True)):
        above = path.parents[: max(0, len(path.parts) - 1 - spelled)]
        for folder in above:
            runs.setdefault(folder, _is_run(folder))
        if not any(runs[folder] for folder in above):
            yield path
    left_out["run folder"] += sum(runs.values())


def _text_files(paths: Iterable[Path], left_out: Counter[str]) -> Iterator[Path]:
    seen = set()  # `**` in a glob follows links, also into a folder above
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        if not path.is_file():
            continue
        real = os.path.realpath(path)
        if real in seen:
            left_out["repeated file"] += 1
            continue
        seen.add(real)
        with open(path, "rb") as file:
            binary = b"\0" in file.read(_PROBED)
        if binary:
            left_out["binary file"] += 1
        else:
            yield path


def _is_run(folder: Path) -> bool:
    """Whether the trainer made it, or holds it for a run that is about to begin."""
    begun = os.path.isfile(folder / "config.json") and os.path.isdir(folder / "checkpoints")
    return begun or all(os.path.isfile(folder / name) for name in (".lock", ".pid"))


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _stdlib() -> list[Path]:
    """Source text of the running interpreter's standard library, in the order of its paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _LEFT_OUT and not _GENERATED.fullmatch(f)]
        paths += [Path(folder) / name for name in names
                  if name.endswith(".py") and not _GENERATED.fullmatch(name)]  # fmt: skip
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise UserError("this Python has no source text of its standard library; give --data")
    return paths
