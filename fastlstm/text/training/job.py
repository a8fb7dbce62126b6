"""A job: one training run in memory, between two of its steps.

Request: what the user asked for, a Config and the flags that are no part of one (options.py).
Run: the files of a run's folder, written and read back (run.py).
About: the commands, the machine and the text of a run, as its about.json holds them (about.py).
Progress: where a run stands, as its checkpoints hold it (run.py).
Team: the processes that train together (team.py).
Job: all of these, the model, the optimizer and the text, ready for a step (here).
Step: what a step gave, and what is due after it (here).
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import checkpoint, model
from ..alphabet import UNITS, Alphabet, Unit
from ..data.corpus import Streams
from ..model import CharModel, states
from ..pages.report import Snapshot
from ..pages.scale import Scale
from ..sampling import sample_text
from .options import Config
from .run import Progress, Run, generator_name
from .team import Team

LN2 = math.log(2)
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Job:
    """All that the training loop works on."""

    config: Config
    run: Run
    team: Team
    streams: dict[str, Streams]
    device: torch.device
    model: CharModel
    forward: Callable[..., Any]  # the model, compiled or spread over the team if so asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meta: dict[str, Any]  # of its checkpoints: alphabet and architecture
    progress: Progress
    total: int  # steps
    resumed: bool
    hx: Any = None  # the state carried from the window before
    rate: float = 0.0  # characters or tokens a second
    about: dict[str, Any] = field(default_factory=dict)  # as of about.json
    begun: float = 0.0  # on the monotonic clock, less the seconds of sessions before
    saved: float = 0.0  # on the same clock, the last checkpoint

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet.of(self.meta)

    @property
    def unit(self) -> Unit:
        """What the model reads, one at a time."""
        return UNITS[self.config.unit]

    def bits(self, nats: float, name: str) -> float:
        """A loss over a split in bits a character, or a byte where the model reads tokens."""
        return nats / LN2 / (self.streams[name].bytes_each if self.unit.in_bytes else 1)

    @property
    def stale(self) -> bool:
        """Whether the model no longer gets better."""
        return 0 < self.config.patience <= self.progress.worse

    @property
    def ended(self) -> bool:
        """Whether the run is as long as asked, or no longer gets better."""
        return self.stale or self.progress.step >= self.total

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run."""
        return f"python -m fastlstm.train --out {shlex.quote(str(self.run.folder))} --resume"

    @property
    def longer_command(self) -> str:
        """The command that makes the run longer; one that got no better would end at once."""
        beyond = f"--patience 0 --steps {2 * self.progress.step}" if self.stale else (
            f"--steps {2 * self.total}")  # fmt: skip
        return f"{self.resume_command} {beyond}"

    @property
    def why_stale(self) -> str:
        """In words, where it is."""
        evaluations = "evaluation" + "s" * (self.config.patience != 1)
        return f"no better validation loss in {self.config.patience} {evaluations}"

    def start_clocks(self) -> None:
        """Count the time from now on."""
        self.saved = time.monotonic()
        self.begun = self.saved - self.progress.seconds

    def save(self, *names: str) -> None:
        """Write checkpoints: rank 0 does, of what it gathers from the whole team."""
        training = checkpoint.optimizer_tensors(self.optimizer)
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        for kind, generator in generators.items():
            for rank, state in enumerate(self.team.gather(generator)):
                training[generator_name(kind, rank)] = state
        for j, x in enumerate(states(self.hx)):
            training[f"state.{j}"] = torch.cat(self.team.gather(x), dim=1)
        if self.run.writes:
            self.progress.scaler = self.scaler.state_dict() or None
            meta = {**self.meta, **asdict(self.progress)}
            self.run.save(list(names), self.model, training, meta)
        self.saved = time.monotonic()

    def autocast(self) -> torch.autocast:
        """bf16 and fp16: the multiplications in half precision, weights and optimizer in fp32."""
        low = LOW.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=low, enabled=low is not None)

    def evaluate(self, name: str) -> float:
        """Mean loss in nats over a split."""
        with self.autocast():
            sums = self.team.numbers(*model.evaluate(self.model, self.streams[name], self.device))
        return sum(nats for nats, _ in sums) / sum(count for _, count in sums)

    def sample(self, length: int) -> str:
        """What the model writes now; it goes to samples.jsonl as well."""
        text = sample_text(self.model, self.alphabet, length, self.config.seed)
        self.run.samples.append({"step": self.progress.step, "text": text})
        return text

    def snapshot(self, status: str) -> Snapshot:
        """For the report."""
        p = self.progress
        run = shlex.quote(str(self.run.folder))
        return Snapshot(
            name=self.run.folder.resolve().name,
            status=status,
            step=p.step,
            total=self.total,
            epoch=p.epoch + p.position / self.streams["train"].windows,
            seconds=p.seconds,
            rate=self.rate,
            best=p.best,
            settings=self.config.settings(),
            about=self.about,
            commands=[("Draw text from it:", f"python -m fastlstm.sample {run} -n 1000"),
                      ("Train it longer:", self.longer_command),
                      ("Look into its cells:",
                       f"python -m fastlstm.inspect {run} --text FILE")],
            scale=self.run.scale,
        )  # fmt: skip


@dataclass
class Step:
    """What one optimizer step gave, and what is due after it.

    Attributes:
        rate: the learning rate.
        nats: the training loss over the whole team's streams.
        norm: of the gradient, before it is clipped.
        signal: number of the signal that any process of the team received, or 0.
        overdue: whether the last checkpoint is older than a killed run may lose.
        speed: characters or tokens a second.
        epochs: passes over the text that lie behind, with the fraction of the current one.
        evaluated: whether an evaluation was due.
        val: the validation loss, where there was one.
        sample: what the model wrote, where that was due.
        checkpoints: names to save under, beside ``latest``.
    """

    rate: float
    nats: float
    norm: float
    signal: int
    overdue: bool
    speed: float = 0.0
    epochs: float = 0.0
    evaluated: bool = False
    val: float | None = None
    sample: str | None = None
    checkpoints: list[str] = field(default_factory=list)

    def figures(self, scale: Scale) -> dict[str, float]:
        """What trackers show, by the names that they show it under."""
        values = {"loss/training": self.nats, "loss/validation": self.val, "lr": self.rate,
                  "gradient_norm": self.norm}  # fmt: skip
        if scale.in_bytes:
            values["bits_per_byte/training"] = self.nats * scale.train
            values["bits_per_byte/validation"] = self.val and self.val * scale.val
            values["tokens_per_second"] = self.speed
        else:
            values["chars_per_second"] = self.speed
        return {name: value for name, value in values.items() if value is not None}
