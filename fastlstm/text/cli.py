"""What the commands share: one line for a mistake, and no traceback for what is no bug."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from . import UserError

_OPTIONAL = ("numpy", "safetensors", "tqdm", "matplotlib", "pooch", "filelock")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage above it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(name: str, command: Callable[[], int]) -> None:
    """Call ``command`` and turn what may go wrong outside the code into an exit status.

    Raises:
        SystemExit: with the command's status where it is not 0; 2 after a mistake of the user's and
            1 after an error of the system, each with one line on standard error; 130 after Ctrl-C.
            A reader who leaves a pipe is no error.
    """
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
    except OSError as error:  # a full disk, a folder that went away
        where = f"{error.filename}: " if error.filename else ""
        refuse(name, f"{where}{error.strerror or error}")
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if status:
        raise SystemExit(status)


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
        noun = ("byte" if unit == "byte" else "character") + "s" * (unknown > 1)
        line = f"{command}: {flag}: the model has never seen {unknown:,} {noun}: skipped"
        print(line, file=sys.stderr)


def refuse(name: str, message: str) -> int:
    """Print a command's error in one line and return the exit status of a mistake."""
    say(f"{name}: error: {' '.join(message.split())}", sys.stderr)
    return 2
