"""Text from standard input, of which a run keeps a copy: it cannot be read twice."""

from __future__ import annotations

import sys
from io import BufferedReader
from pathlib import Path
from typing import cast

from .. import UserError
from ..files import naming

PIECE = 1 << 20  # bytes that are held at a time


def standard_input(flag: str) -> BufferedReader:
    """Standard input, to be read to its end; whoever types it is told how to end it.

    Args:
        flag: that asked for it, for errors.

    Raises:
        UserError: it is closed.
    """
    if sys.stdin is None:
        raise UserError(f"{flag}: standard input is closed")
    if sys.stdin.buffer.isatty():
        print("reading the text from standard input; end it with Ctrl-D", file=sys.stderr)
    return cast(BufferedReader, sys.stdin.buffer)


class KeptInput:
    """A run's copy of what came from standard input: ``stdin.txt`` in its folder.

    Attributes:
        path: where to read it.
    """

    def __init__(self, folder: Path) -> None:
        self._kept = self.path = folder / "stdin.txt"
        self._received = folder / "stdin.txt.tmp"

    def receive(self) -> None:
        """Read standard input into a temporary file until :meth:`keep` or :meth:`discard`.

        Raises:
            UserError: it is closed, or there is no room for it.
        """
        source, self.path = standard_input("--data -"), self._received
        try:
            with naming(self.path), open(self.path, "wb") as file:
                while piece := source.read1(PIECE):  # read would wait for a second Ctrl-D
                    file.write(piece)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise UserError(f"--data -: cannot keep standard input in {reason}") from error

    def require(self) -> None:
        """Raise UserError where a run to resume has no copy."""
        if not self._kept.exists():
            raise UserError(
                f"--resume: the text came from standard input and {self._kept} is not there; "
                "give the same text once more with --data -"
            )

    def keep(self) -> None:
        """The text that was received is the run's."""
        if self.path == self._received:
            self._received.replace(self._kept)

    def discard(self) -> None:
        """Remove what was received and is not kept."""
        self._received.unlink(missing_ok=True)
