"""What ``python -m fastlstm.<command>`` says where the package itself cannot be imported."""

from __future__ import annotations

import re
import sys


def refuse_command(error: Exception) -> None:
    """End one of the package's commands with one line and exit status 2; else do nothing.

    The commands' own handling of mistakes comes too late for those in the environment, such as an
    instruction set in ``FASTLSTM_CPU_ISA`` that the processor lacks.

    Raises:
        SystemExit: the package is being imported for one of its commands.
    """
    if sys.argv[:1] != ["-m"]:  # which stands there until Python has imported the package
        return
    command = re.search(r"-\w*m\0?(fastlstm\.\w+)", "\0".join(sys.orig_argv))
    if command:
        from .text import cli

        raise SystemExit(cli.refuse(command[1], str(error)))
