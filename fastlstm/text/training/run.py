"""A run's folder: its config, metrics, checkpoints and loss curve, each whole at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import UserError, checkpoint
from ..data.stdin import KeptInput
from ..files import replacing, write_text
from ..model import CharModel, load
from ..pages.report import Snapshot, report
from ..pages.scale import NATS
from .lock import Claim, InUseError
from .options import Config
from .records import Metrics, Samples


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
        progress = Progress(**{name: meta[name] for name in asdict(Progress()) if name in meta})
        counts = (progress.step, progress.epoch, progress.position, progress.worse)
        if (
            any(type(value) is not int or value < 0 for value in counts)
            or progress.position >= windows
            or not _finite(progress.seconds)
            or not (progress.best is None or _finite(progress.best))
            or not (progress.scaler is None or isinstance(progress.scaler, dict))
        ):
            raise ValueError("meta.json does not say where the run stands")
        return progress


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def generator_name(kind: str, rank: int) -> str:
    """What a checkpoint calls the state of a process's random generator."""
    return f"rng.{kind}.{rank}" if rank else f"rng.{kind}"


def free_folder(name: str, root: Path = Path("runs")) -> Path:
    """runs/NAME-1, runs/NAME-2, ...: the first that does not exist."""
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"


def claim_folder(out: str | None, name: str, resume: bool, patience: float) -> Claim:
    """Hold the folder of a run to resume, or of a new one.

    Args:
        out: the folder; where it is None, the first free one of this ``name`` in runs/.
        patience: seconds to wait for the process that has it.

    Raises:
        UserError: it cannot be had, or holds no run to resume, or one that should not be replaced.
    """
    while True:
        folder = Path(out) if out else free_folder(name)
        try:
            if (folder / "config.json").exists() is not resume:
                raise UserError(
                    f"--resume: {folder} holds no run" if resume else
                    f"--out: {folder} already holds a run; --resume goes on with it"
                )  # fmt: skip
            # A run that was killed before it wrote config.json has an empty one.
            log = folder / "metrics.jsonl"
            if not resume and log.is_file() and log.stat().st_size:
                raise UserError(
                    f"--out: {folder} has a metrics.jsonl but no config.json: it holds no run of "
                    "ours, or one that lost a part; expected a new folder"
                )
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--out: {folder} is a file, not a folder")
            return Claim(folder, new=not resume, patience=patience)
        except InUseError:
            if out:  # else somebody took the free one a moment before
                raise
        except OSError as error:
            raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from error


class Run:
    """Writes a run's files and reads them back.

    Args:
        folder: the run's.
        claim: on the folder; None in all processes but one of those that train together, which
            then write nothing.

    Attributes:
        title: of loss.png: what is trained on what.
        scale: what losses are shown in.
    """

    title, scale = "", NATS

    def __init__(self, folder: Path, claim: Claim | None) -> None:
        self.folder, self.writes, self._claim = folder, claim is not None, claim
        self.metrics = Metrics(folder / "metrics.jsonl", self.writes)
        self.samples = Samples(folder / "samples.jsonl", self.writes)
        self.stdin = KeptInput(folder)
        self._plotted = self._reported = -math.inf

    def begin(self, config: Config, sha256: str, save: Callable[[], None]) -> None:
        """Write a first checkpoint; config.json comes last and makes the folder a run.

        Raises:
            UserError: it cannot be written.
        """
        try:
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            self.keep_until(0)
            save()
            self.write_config(config, sha256)
        except OSError as error:
            raise UserError(f"--out: cannot write to {self.folder}: {error.strerror}") from error

    def abandon(self) -> None:
        """Leave the folder as it was before, for there will be no such run."""
        if self._claim is not None:
            self.stdin.discard()
            self._claim.abandon()

    def release(self) -> None:
        """Let other processes write to the folder."""
        if self._claim is not None:
            self._claim.release()

    def keep_until(self, step: int) -> None:
        """Forget what was written down after this step."""
        self.metrics.keep_until(step)
        self.samples.keep_until(step)

    def close(self) -> None:
        self.metrics.close()
        self.samples.close()

    def write_config(self, config: Config, sha256: str) -> None:
        text = json.dumps({**config.settings(), "data_sha256": sha256}, indent=2)
        write_text(self.folder / "config.json", text + "\n")

    def read_config(self) -> tuple[dict[str, Any], str]:
        """The stored options and the checksum of their text, both unverified.

        Raises:
            UserError: there is no run, or its config.json is damaged.
        """
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            return config, str(config.pop("data_sha256"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"--resume: {self.folder} holds no run") from None
        except PermissionError as error:
            raise UserError(f"--resume: cannot read {error.filename}: {error.strerror}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--resume: {self.folder}/config.json is damaged: {error}") from error

    def save(
        self,
        names: list[str],
        model: CharModel,
        training: dict[str, Tensor],
        meta: dict[str, Any],
    ) -> None:
        """Write the checkpoints of these names, all alike.

        ``latest`` goes last: whoever resumes from an older one writes the others again.
        """
        self.metrics.flush()
        self.samples.flush()
        for name in sorted(names, key=lambda name: name == "latest"):
            folder = self.folder / "checkpoints" / name
            checkpoint.save(folder, model.state_dict(), training, {"format": 1, **meta})

    def restore(
        self,
        model: CharModel,
        optimizer: torch.optim.Optimizer,
        batch: int,
        meta: dict[str, Any],
        rank: int = 0,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Load ``latest`` into model, optimizer and generators; its carried state and ``meta``.

        Args:
            batch: number of streams, which the carried state must have.
            meta: what the checkpoint's must agree with.
            rank: whose generators to load. One that was not there when it was saved keeps its own.

        Raises:
            UserError: the checkpoint is damaged or of another run.
        """
        name = self.folder / "checkpoints" / "latest"
        place, theirs = checkpoint.load_meta(name)
        load(model, checkpoint.load_tensors(place, "model"), name)
        training = checkpoint.load_tensors(place, "training")
        device = model.decoder.weight.device
        try:
            for key, value in meta.items():
                if key != "seen" and theirs.get(key) != value:  # the text tells what was seen
                    raise ValueError(f"its {key} differs")
            hx = [training[key].to(device) for key in sorted(training) if key.startswith("state.")]
            shape = (model.rnn.num_layers, batch, model.rnn.hidden_size)
            gated = model.rnn.mode == "LSTM"
            if hx and [x.shape for x in hx] != [shape] * (1 + gated):
                raise ValueError("its carried state has the wrong shape")
            if not all(x.is_floating_point() and x.dtype != torch.float64 for x in hx):
                raise ValueError("its carried state has the wrong dtype")
            checkpoint.restore_optimizer(optimizer, training)
            if rank == 0 or generator_name("cpu", rank) in training:
                torch.set_rng_state(training[generator_name("cpu", rank)])
            if device.type == "cuda" and generator_name("cuda", rank) in training:
                torch.cuda.set_rng_state(training[generator_name("cuda", rank)], device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"the checkpoint {name} does not fit this run: {error}") from error
        return hx, theirs

    def plot(self, at_least_after: float = 0.0) -> None:
        """loss.png: training and validation loss over steps; not if drawn so many seconds ago."""
        early = time.monotonic() - self._plotted < at_least_after
        if early or not (self.writes and self.metrics.steps):
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        m = self.metrics
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        scale = self.scale
        axes.plot(m.steps, np.array(m.train) * scale.train, lw=0.7, label="training")
        if m.val_steps:
            axes.plot(m.val_steps, np.array(m.val) * scale.val, "o-", ms=3, label="validation")
        axes.set(xlabel="step", ylabel=scale.label, title=self.title)
        if not scale.in_bytes:
            bits = (lambda x: x / math.log(2), lambda x: x * math.log(2))
            axes.secondary_yaxis("right", functions=bits).set_ylabel("bits a character")
        axes.legend()
        axes.grid(alpha=0.3)
        with replacing(self.folder / "loss.png") as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        self._plotted = time.monotonic()

    def report(self, snapshot: Callable[[], Snapshot], at_least_after: float = 0.0) -> None:
        """report.html, replaced in one step; not if written so many seconds ago."""
        if not self.writes or time.monotonic() - self._reported < at_least_after:
            return
        page = report(snapshot(), self.metrics, self.samples.entries)
        with replacing(self.folder / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")  # names of files
        self._reported = time.monotonic()
