"""Signals that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupts:
    """Lets Ctrl-C and SIGTERM wait for the end of a step; the second one does not wait.

    So does SIGHUP, which a closed terminal sends, but for a process that ignores it (nohup).

    Attributes:
        number: of the signal that came, or 0.
    """

    number = 0

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
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
