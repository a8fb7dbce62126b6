"""Files that are replaced in one step: no reader and no killed run leaves or sees half a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the file's name, which one raised by a write lacks."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which then takes the place of ``path``.

    Raises:
        OSError: it cannot be written, with ``path`` as its ``filename``; what was there is kept,
            and the temporary file is gone.
    """
    if not path.name:  # "." or "/"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, and have it on the disk before what comes next.

    The bytes of a file's name that are no UTF-8 become question marks.
    """
    encoded = text.encode("utf-8", errors="replace")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(encoded)
        file.flush()
        os.fsync(file.fileno())
