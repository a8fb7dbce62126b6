"""Where a run's figures go besides its folder: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from .. import UserError
from ..files import write_text
from .job import Job
from .options import Config

PROJECT = "fastlstm"
ID_FILE = "tracker-id"


class Tracker(Protocol):
    """What the training loop tells of."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures after a step, by names such as ``loss/training``."""

    def sample(self, step: int, text: str) -> None:
        """What the model wrote after a step."""

    def close(self) -> None:
        """The run ends."""


class TensorBoard:
    """Events in RUN/tensorboard; those of a killed run after its last checkpoint are dropped."""

    def __init__(self, module: Any, job: Job) -> None:
        folder = job.run.folder / "tensorboard"
        self._writer = module.SummaryWriter(str(folder), purge_step=job.progress.step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def sample(self, step: int, text: str) -> None:
        indented = "\n".join("    " + line for line in text.splitlines())  # Markdown's code
        self._writer.add_text("sample", indented, step)

    def close(self) -> None:
        self._writer.close()


class Service:
    """A run of a package that has ``init``, whose runs have ``log`` and ``finish``.

    Args:
        options: what tells this run from others.
    """

    def __init__(self, module: Any, job: Job, **options: Any) -> None:
        config = job.config.settings()
        self._run = module.init(project=PROJECT, resume="allow", config=config, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def sample(self, step: int, text: str) -> None:
        self._run.log({"sample": text}, step=step)

    def close(self) -> None:
        self._run.finish()


def wandb(module: Any, job: Job) -> Tracker:
    """A run of Weights & Biases, whose runs have ids."""
    folder = job.run.folder.resolve()
    return Service(module, job, id=run_id(folder), name=folder.name, dir=str(folder))


def trackio(module: Any, job: Job) -> Tracker:
    """A run of Trackio, which tells runs apart by their names."""
    folder = job.run.folder.resolve()
    return Service(module, job, name=f"{folder.name}-{run_id(folder)}")


# By the names of their flags, which are those of the packages: the module, and what opens one.
TRACKERS: dict[str, tuple[str, Callable[[Any, Job], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", wandb),
    "trackio": ("trackio", trackio),
}


def modules(config: Config) -> dict[str, Any]:
    """The packages that the config asks for, by the names of their flags.

    Raises:
        UserError: one is missing.
    """
    loaded = {}
    for name, (module, _) in TRACKERS.items():
        if getattr(config, name):
            try:
                loaded[name] = import_module(module)
            except ImportError as error:
                raise UserError(f"--{name}: not installed: pip install {name}") from error
    return loaded


def open_trackers(job: Job) -> list[Tracker]:
    """Those that the config asks for, in the process that writes.

    Raises:
        UserError: a package is missing, or refuses the run.
    """
    trackers: list[Tracker] = []
    for name, module in modules(job.config).items() if job.run.writes else ():
        try:
            trackers.append(TRACKERS[name][1](module, job))
        except Exception as error:  # not logged in, no network: each package has its own errors
            close_all(trackers)
            raise UserError(f"--{name}: {error}") from error
    return trackers


def close_all(trackers: list[Tracker]) -> None:
    """Close every tracker."""
    for tracker in trackers:
        tracker.close()


def run_id(folder: Path) -> str:
    """What a service knows the run by: drawn once, and kept in the run's folder."""
    path = folder / ID_FILE
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text(encoding="ascii").strip()
