"""Lines by which a log without a terminal shows that a run is alive."""

from __future__ import annotations

import time

SECONDS = 10.0  # between two lines


class Heartbeat:
    """Says when the next line is due.

    Args:
        wanted: whether lines are wanted at all; a terminal has the bar.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._last = wanted, time.monotonic()

    def printed(self) -> None:
        """A line was printed."""
        self._last = time.monotonic()

    def due(self) -> bool:
        return self._wanted and time.monotonic() - self._last >= SECONDS
