"""What the package's commands say where the package itself cannot be imported."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def refuse_command(error: Exception) -> None:
    """End one of the package's commands with one line and exit status 2; else do nothing.

    The commands' own handling of mistakes comes too late for those in the environment, such as an
    instruction set in ``FASTLSTM_CPU_ISA`` that the processor lacks.

    Raises:
        SystemExit: the package is being imported for one of its commands.
    """
    program = sys.argv[0] if sys.argv else ""
    if Path(program).name == "fastlstm":  # the console script
        name = "fastlstm"
    elif program == "-m":  # which stands there until Python has imported the package
        module = re.search(r"-\w*m\0?(fastlstm(\.\w+)?)(\0|$)", "\0".join(sys.orig_argv))
        name = module[1] if module else ""
    else:
        return
    if name:
        from .text import cli

        raise SystemExit(cli.refuse(name, str(error)))
