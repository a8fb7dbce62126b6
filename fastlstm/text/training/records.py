"""What a run writes down as it goes, a line of JSON at a time: its metrics and its samples."""

from __future__ import annotations

import json
import math
import os
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import naming, write_text
from ..pages.scale import NATS, Scale

# What reading a line raises that is under way, of a killed run, or damaged.
NOT_OURS = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


class Records:
    """A file of JSON objects, a line each, ascending in their ``step``.

    Args:
        path: of the file; where ``writes`` is false it is never touched.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self._file: Any = None

    def keep_until(self, step: int) -> None:
        """Forget torn lines, and what came after the checkpoint that the run goes on from."""
        if not self._writes:
            return
        kept = []
        with open(self.path, "a+", encoding="utf-8", errors="replace") as file:
            file.seek(0)
            for line in file:
                try:
                    entry = json.loads(line)
                    if entry["step"] > step:
                        break
                    self.remember(entry)
                except NOT_OURS:
                    continue
                kept.append(json.dumps(entry) + "\n")
        write_text(self.path, "".join(kept))

    def look(self) -> None:
        """Take what the file says, and leave it as it is."""
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(*NOT_OURS):
                    self.remember(json.loads(line))

    def remember(self, values: dict[str, Any]) -> None:
        """Take what a line says; one of NOT_OURS where it is none of ours."""
        raise NotImplementedError

    def append(self, values: dict[str, Any]) -> None:
        self.remember(values)
        if not self._writes:
            return
        with naming(self.path):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()  # for whoever watches

    def flush(self) -> None:
        """Have the lines on the disk, before the checkpoint that counts on them."""
        if self._file is not None:
            with naming(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # only where append said so before
                self._file.close()
            self._file = None


class Metrics(Records):
    """metrics.jsonl, a line a step, and the losses in it for the curves."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        super().__init__(path, writes)
        self.steps, self.train = array("q"), array("d")
        self.val_steps, self.val = array("q"), array("d")
        # Not a number where a line has none.
        self.seconds, self.rates, self.norms = array("d"), array("d"), array("d")

    def log(
        self, step: int, epoch: float, train: float, val: float | None, speed: float,
        seconds: float, rate: float, norm: float, scale: Scale = NATS,
    ) -> None:  # fmt: skip
        """Append a line; ``bpc`` is the training loss in bits, the norm that of the gradient.

        Where losses are those of tokens, it has them in bits a byte as well.
        """
        bits: dict[str, Any] = {"bpc": train / math.log(2)}
        if scale.in_bytes:
            bits = {"bits_per_byte": train * scale.train,
                    "val_bits_per_byte": None if val is None else val * scale.val}  # fmt: skip
        speed_name = "tokens_per_second" if scale.in_bytes else "chars_per_second"
        self.append({
            "step": step, "epoch": round(epoch, 6), "train_loss": train, "val_loss": val,
            **bits, speed_name: round(speed, 1), "seconds": round(seconds, 3), "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
        })  # fmt: skip

    def remember(self, values: dict[str, Any]) -> None:
        step, train, val = int(values["step"]), float(values["train_loss"]), values["val_loss"]
        rest = [math.nan if values.get(name) is None else float(values[name])
                for name in ("seconds", "lr", "grad_norm")]  # fmt: skip
        losses = [train, *([] if val is None else [float(val)])]
        if not all(map(math.isfinite, losses)):
            raise ValueError("a loss is no number")
        self.steps.append(step)
        self.train.append(train)
        for column, value in zip((self.seconds, self.rates, self.norms), rest, strict=True):
            column.append(value)
        if val is not None:
            self.val.append(float(val))
            self.val_steps.append(step)


class Samples(Records):
    """samples.jsonl: what the model wrote as it learned, objects with ``step`` and ``text``."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        super().__init__(path, writes)
        self.entries: list[dict[str, Any]] = []

    def remember(self, values: dict[str, Any]) -> None:
        self.entries.append({"step": int(values["step"]), "text": str(values["text"])})
