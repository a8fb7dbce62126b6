"""Signals that wait for the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Interrupts:
    """Lets Ctrl-C and SIGTERM wait for the end of a step; the second one does not wait.

    So does SIGHUP, which a closed terminal sends, but for a process that ignores it (nohup). From
    then on what is written to that terminal goes nowhere, where it would raise.

    Attributes:
        number: of the signal that came, or 0.
    """

    number = 0

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            for number in (signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if number == signal.SIGHUP and self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in self._terminals:
                os.dup2(nowhere, fd)
            os.close(nowhere)
