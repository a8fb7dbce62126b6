"""A process of gpu_check's: does the tasks that come as lines of JSON, one answer a line.

    python -m benchmarks.gpu.worker [TASK ...]    (from stdin where none are arguments)

The first line says that its modules are loaded. After an error that a check did not expect the
process ends with status 1, since CUDA may be of no use to it any more.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from . import checks, profile, times, tools

LOADED = (checks, profile, times, tools)  # before the first task's time runs


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """What a task's check returns, or why it failed; and the seconds that it took."""
    start = time.monotonic()
    try:
        check: Callable[..., dict[str, Any]] = pkgutil.resolve_name(task["check"])
        part = check(**task["arguments"])
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # its errors are this task's
            torch.cuda.empty_cache()
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        part = {"failed": [f"{task['name']}: {type(error).__name__}: {text}"], "over": True}
    return part | {"seconds": time.monotonic() - start}


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print("{}", file=answers, flush=True)
    for line in sys.argv[1:] or sys.stdin:
        part = answer(json.loads(line))
        print(json.dumps(part), file=answers, flush=True)
        if part.get("over"):
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
