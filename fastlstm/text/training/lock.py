"""One writer a run: a folder that one process holds until it ends, however it ends."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .. import UserError
from ..files import write_text

_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class InUseError(UserError):
    """Another process writes this run."""


class Claim:
    """A run's folder, made if need be, that no other process may write.

    The system lets go of the lock on ``.lock`` when the process ends, so a killed one leaves none
    behind. Readers take no lock.

    Args:
        folder: the run's.
        new: make the folder where there is none.
        patience: seconds to wait for the process that has it.

    Raises:
        InUseError: another process has it.
        OSError: it cannot be made or written.
    """

    def __init__(self, folder: Path, *, new: bool, patience: float = 0.0) -> None:
        self.folder, self._lock = folder, FileLock(folder / ".lock")
        self._pid = folder / ".pid"  # not in .lock, which some versions of filelock empty
        self._made: list[Path] = []  # the deepest first
        try:
            if new:
                self._make()
            self._acquire(patience)
        except BaseException:
            self._remove_empty()
            raise
        try:
            write_text(self._pid, f"{os.getpid()}\n")
            with suppress(OSError):  # some versions of filelock give it a mode of their own
                (folder / ".lock").chmod(stat.S_IMODE(self._pid.stat().st_mode))
        except BaseException:
            self.abandon()
            raise

    def _make(self) -> None:
        for path in (*reversed(self.folder.parents), self.folder):
            with suppress(FileExistsError):
                if not path.exists():
                    path.mkdir()
                    self._made.insert(0, path)

    def _acquire(self, patience: float) -> None:
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            try:
                number = f"process {int(self._pid.read_text(encoding='ascii'))}"
            except (OSError, ValueError):
                number = "another process"
            raise InUseError(f"{self.folder} is in use by {number}") from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT_LOCK:
                raise
            print(f"{self.folder}: its file system has no locks, so nothing keeps a second process "
                  f"from writing there too ({error})", file=sys.stderr)  # fmt: skip

    def release(self) -> None:
        """Let another process have the folder. Does nothing the second time."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._pid.unlink()
            self._lock.release()

    def abandon(self) -> None:
        """Release the folder; one that was made for this claim goes, with all that is in it."""
        if self.folder in self._made:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.release()
        self._remove_empty()

    def _remove_empty(self) -> None:
        for path in self._made:  # what others have put there stays
            with suppress(OSError):
                path.rmdir()
