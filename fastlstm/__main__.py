"""Every command by one name: ``fastlstm COMMAND``, or ``python -m fastlstm COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .text import UserError, cli

# What each does; ``fastlstm.<command>`` is its module.
COMMANDS = {
    "train": "train a character-level language model on any text",
    "sample": "draw text from a trained run, or score a text",
    "inspect": "make a page of what a run's cells do as it reads a text",
    "compare": "make a page that lays several runs over each other",
    "info": "print what was built, what this machine has, and what will run",
}


def overview() -> str:
    """What there is."""
    lines = [f"  {name:<9} {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join([
        f"fastlstm {__version__}: a fused LSTM for PyTorch, and character-level models",
        "", "usage: fastlstm COMMAND ...", "", *lines, "",
        "fastlstm COMMAND --help lists a command's flags; python -m fastlstm.COMMAND is the same.",
        "fastlstm --version prints the version alone.",
    ])  # fmt: skip


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command that the arguments begin with, and return an exit status."""
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(overview())
    elif first == "--version":
        print(f"fastlstm {__version__}")
    elif first in COMMANDS:
        import_module(f"fastlstm.{first}").main(arguments[1:])
    else:
        hint = cli.suggestion(first, [*COMMANDS, "--help", "--version"])
        kind = "flag" if first.startswith("-") else "command"
        raise UserError(f"there is no {kind} {first!r}{hint or '; fastlstm --help lists them'}")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm", lambda: dispatch(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
