"""TensorBoard's events of a run, for those who have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import UserError


class Board:
    """Writes events, or nothing.

    Args:
        folder: of the events.
        step: where the run goes on; later events of a killed run are dropped.
        wanted: whether to write.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int, wanted: bool) -> None:
        self._writer: Any = None
        if wanted:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: not installed: pip install tensorboard") from None
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def step(self, step: int, nats: float, val: float | None, lr: float, speed: float) -> None:
        if self._writer is None:
            return
        values = {
            "loss/training": nats,
            "loss/validation": val,
            "lr": lr,
            "chars_per_second": speed,
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def sample(self, step: int, text: str) -> None:
        if self._writer is not None:
            indented = "\n".join("    " + line for line in text.splitlines())  # Markdown's code
            self._writer.add_text("sample", indented, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
