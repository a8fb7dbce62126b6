"""A run's folder: its config, metrics, checkpoints and loss curve, each whole at any moment."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import UserError, checkpoint
from .model import CharModel, as_state, build, load, states
from .options import Config


@dataclass
class Progress:
    """Where a run stands. Its checkpoints' ``meta.json`` holds it.

    Attributes:
        step: optimizer steps taken.
        epoch, position: passes over the text, and windows of the next one, that lie behind.
        best: lowest validation loss in nats so far, or None.
        worse: evaluations since then.
        seconds: spent training and evaluating.
        scaler: state of the gradient scaler of fp16, or None.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    best: float | None = None
    worse: int = 0
    seconds: float = 0.0
    scaler: dict[str, Any] | None = None

    @staticmethod
    def read(meta: dict[str, Any], windows: int) -> Progress:
        """Out of a checkpoint's ``meta``; ValueError where it cannot be."""
        number = (int, float)
        found = Progress(**{name: meta[name] for name in asdict(Progress()) if name in meta})
        counts = (found.step, found.epoch, found.position, found.worse)
        if (
            any(type(value) is not int or value < 0 for value in counts)
            or found.position >= windows
            or type(found.seconds) not in number
            or not (found.best is None or type(found.best) in number)
            or not (found.scaler is None or isinstance(found.scaler, dict))
        ):
            raise ValueError("meta.json does not say where the run stands")
        return found


def load_model(run: Path, name: str) -> tuple[CharModel, list[int], dict[str, Any]]:
    """The model of a run's checkpoint in eval mode, its vocabulary and its ``meta``.

    Raises:
        UserError: no such run or checkpoint, or a damaged one.
    """
    known = checkpoint.names(run / "checkpoints")
    if not known:
        raise UserError(f"{run} is no run: it has no checkpoints")
    if name == "best" and "best" not in known:
        name = "latest"  # a run without validation has no best one
    if name not in known:
        raise UserError(f"{run} has no checkpoint {name!r}; it has {', '.join(known)}")
    found, meta = checkpoint.load_meta(run / "checkpoints" / name)
    model = build(meta, checkpoint.load_tensors(found, "model"), found)
    return model, meta["vocabulary"], meta


def free_folder(name: str, root: Path = Path("runs")) -> Path:
    """runs/NAME-1, runs/NAME-2, ...: the first that does not exist."""
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"


class Run:
    """Writes a run's files and reads them back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = Metrics(folder / "metrics.jsonl")
        self._plotted = -math.inf

    def refuse_taken(self) -> None:
        """Raise UserError where the folder holds a run or cannot be one."""
        if (self.folder / "config.json").exists():
            raise UserError(f"--out: {self.folder} already holds a run; --resume goes on with it")
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out: {self.folder} is a file, not a folder")

    def begin(self, config: Config, sha256: str, save: Callable[[], None]) -> None:
        """Make the folder with a first checkpoint; config.json comes last and makes it a run.

        Raises:
            UserError: it cannot be written; nothing is left behind.
        """
        above = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.metrics.keep_until(0)
            save()
            self.write_config(config, sha256)
        except (OSError, UserError) as error:
            if above:
                shutil.rmtree(above[-1], ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--out: cannot write to {self.folder}: {reason}") from error

    def write_config(self, config: Config, sha256: str) -> None:
        text = json.dumps({**asdict(config), "data_sha256": sha256}, indent=2)
        checkpoint.write_text(self.folder / "config.json", text + "\n")

    def read_config(self) -> tuple[dict[str, Any], str]:
        """The stored options and the checksum of their text, both unverified.

        Raises:
            UserError: there is no run, or its config.json is damaged.
        """
        try:
            found = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            return found, str(found.pop("data_sha256"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"--resume: {self.folder} holds no run") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--resume: {self.folder}/config.json is damaged: {error}") from error

    def save(
        self,
        names: list[str],
        model: CharModel,
        optimizer: torch.optim.Optimizer,
        hx: Any,
        meta: dict[str, Any],
    ) -> None:
        """Write the checkpoints of these names, all alike.

        ``latest`` goes last: whoever resumes from an older one writes the others again.
        """
        self.metrics.flush()
        training = checkpoint.optimizer_tensors(optimizer)
        training["rng.cpu"] = torch.get_rng_state()
        if model.decoder.weight.is_cuda:
            training["rng.cuda"] = torch.cuda.get_rng_state(model.decoder.weight.device)
        for j, x in enumerate(states(hx)):
            training[f"state.{j}"] = x
        for name in sorted(names, key=lambda name: name == "latest"):
            folder = self.folder / "checkpoints" / name
            checkpoint.save(folder, model.state_dict(), training, {"format": 1, **meta})

    def restore(
        self, model: CharModel, optimizer: torch.optim.Optimizer, batch: int, meta: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Load ``latest`` into model, optimizer and generators; its carried state and ``meta``.

        Args:
            batch: number of streams, which the carried state must have.
            meta: what the checkpoint's must agree with.

        Raises:
            UserError: the checkpoint is damaged or of another run.
        """
        name = self.folder / "checkpoints" / "latest"
        found, theirs = checkpoint.load_meta(name)
        load(model, checkpoint.load_tensors(found, "model"), name)
        training = checkpoint.load_tensors(found, "training")
        device = model.decoder.weight.device
        try:
            for key, value in meta.items():
                if theirs.get(key) != value:
                    raise ValueError(f"its {key} differs")
            hx = [training[key].to(device) for key in sorted(training) if key.startswith("state.")]
            shape = (model.rnn.num_layers, batch, model.rnn.hidden_size)
            gated = model.rnn.mode == "LSTM"
            if hx and [x.shape for x in hx] != [shape] * (1 + gated):
                raise ValueError("its carried state has the wrong shape")
            if not all(x.is_floating_point() for x in hx):
                raise ValueError("its carried state has the wrong dtype")
            checkpoint.restore_optimizer(optimizer, training)
            torch.set_rng_state(training["rng.cpu"])
            if device.type == "cuda" and "rng.cuda" in training:
                torch.cuda.set_rng_state(training["rng.cuda"], device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"the checkpoint {name} does not fit this run: {error}") from error
        return as_state(hx), theirs

    def plot(self, at_least_after: float = 0.0) -> None:
        """loss.png: training and validation loss over steps; not if drawn so many seconds ago."""
        if time.monotonic() - self._plotted < at_least_after or not self.metrics.steps:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        m = self.metrics
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(m.steps, m.train, lw=0.7, label="training")
        if m.val_steps:
            axes.plot(m.val_steps, m.val, "o-", ms=3, label="validation")
        axes.set(xlabel="step", ylabel="nats a character", title=self.folder.name)
        bits = (lambda x: x / math.log(2), lambda x: x * math.log(2))
        axes.secondary_yaxis("right", functions=bits).set_ylabel("bits a character")
        axes.legend()
        axes.grid(alpha=0.3)
        temporary = self.folder / "loss.png.tmp"
        figure.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, self.folder / "loss.png")
        self._plotted = time.monotonic()


class Metrics:
    """metrics.jsonl, a line a step, and the losses in it for the plot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self.steps, self.train = array("q"), array("d")
        self.val_steps, self.val = array("q"), array("d")

    def keep_until(self, step: int) -> None:
        """Forget what was measured after the checkpoint that the run goes on from."""
        kept = []
        with open(self.path, "a+", encoding="utf-8", errors="replace") as file:
            file.seek(0)
            for line in file:
                try:
                    found = json.loads(line)
                    if found["step"] > step:
                        break
                    self._remember(found)
                except (ValueError, KeyError, TypeError):  # the last line of a killed run
                    break
                kept.append(json.dumps(found) + "\n")
        checkpoint.write_text(self.path, "".join(kept))

    def log(
        self, step: int, epoch: float, train: float, val: float | None, speed: float, seconds: float
    ) -> None:
        """Append a line; ``bpc`` is the training loss in bits."""
        values = {
            "step": step, "epoch": round(epoch, 6), "train_loss": train, "val_loss": val,
            "bpc": train / math.log(2), "chars_per_second": round(speed, 1),
            "seconds": round(seconds, 3),
        }  # fmt: skip
        self._remember(values)
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()  # for whoever watches

    def flush(self) -> None:
        """Have the lines on the disk, before the checkpoint that counts on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _remember(self, values: dict[str, Any]) -> None:
        step, train, val = int(values["step"]), float(values["train_loss"]), values["val_loss"]
        self.steps.append(step)
        self.train.append(train)
        if val is not None:
            self.val.append(float(val))
            self.val_steps.append(step)
