"""What the commands share: one line for a mistake, and no traceback for what is no bug."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from . import UserError

_OPTIONAL = ("numpy", "safetensors", "tqdm", "matplotlib", "pooch", "filelock")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with what may have been meant.

    Args:
        command: its name behind ``fastlstm``.
        options: those of ``argparse.ArgumentParser``.
    """

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=_as_typed(command), allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The values of all flags; UserError for one that there is not."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((word for word in unknown if word.startswith("-")), "")
            hint = suggestion(name.split("=")[0], self._option_string_actions)
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return values

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += suggestion(str(value), action.choices or ())
            raise


def suggestion(name: str, names: Iterable[str]) -> str:
    """What to add to an error about a misspelt name: the closest of those that there are."""
    letters = {other.lstrip("-"): other for other in names}  # dashes are alike in all flags
    close = difflib.get_close_matches(name.lstrip("-"), list(letters), n=1)
    return f"; did you mean {letters[close[0]]}?" if close else ""


def _as_typed(command: str) -> str:
    """How the user started a command."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name == "fastlstm":
        return f"fastlstm {command}"
    if program.name == "__main__.py" and program.parent.name == "fastlstm":
        return f"python -m fastlstm {command}"
    return f"python -m fastlstm.{command}"


def run(name: str, command: Callable[[], int]) -> None:
    """Call ``command`` and turn what may go wrong outside the code into an exit status.

    Raises:
        SystemExit: with the command's status where it is not 0; 2 after a mistake of the user's and
            1 after an error of the system, each with one line on standard error; 130 after Ctrl-C.
            A reader who leaves a pipe is no error.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as a service's may be
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log should show how far a run is, and what no terminal can show must not stop it.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        status = command()
        sys.stdout.flush()
    except UserError as error:
        status = refuse(name, str(error))
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in _OPTIONAL:
            raise
        status = refuse(name, f"{package} is not installed: pip install 'fastlstm[text]'")
    except BrokenPipeError:  # as in `| head`: whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (MemoryError, RuntimeError) as error:
        if not is_of_memory(error):
            raise
        # In every process, for one of a team may be alone with it.
        print(f"{name}: error: out of memory: {first_line(error)}", file=sys.stderr)
        status = 1
    except OSError as error:  # a full disk, a folder that went away
        where = f"{error.filename}: " if error.filename else ""
        refuse(name, f"{where}{error.strerror or error}")
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if status:
        raise SystemExit(status)


def reader_has_left(error: OSError) -> bool:
    """Whether a pipe's other end was closed, or the terminal was."""
    return isinstance(error, BrokenPipeError) or (
        error.errno == errno.EIO and error.filename is None
    )


def is_of_memory(error: Exception) -> bool:
    """Whether Python or torch ran out of memory; torch's error is a plain one for a CPU's."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """What an error says, without what torch adds; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(line: str, file: Any = None) -> None:
    """Print a line, of all processes that torchrun started on a machine only in the first.

    Args:
        file: standard output where it is None.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=file)


def note_unknown(command: str, flag: str, unknown: int, unit: str) -> None:
    """Say how many characters of a text were left out, for the model does not know them."""
    if unknown:
        from .alphabet import note_of_unknown

        print(f"{command}: {flag}: {note_of_unknown(unknown, unit)}", file=sys.stderr)


def refuse(name: str, message: str) -> int:
    """Print a command's error in one line and return the exit status of a mistake."""
    say(f"{name}: error: {' '.join(message.split())}", sys.stderr)
    return 2
