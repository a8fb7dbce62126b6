"""A run's folder: config, metrics, checkpoints, the loss curve."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import UserError, checkpoint
from .model import CharModel, as_state, states
from .options import Config


def build_model(meta: dict[str, Any]) -> CharModel:
    """The model that a checkpoint's ``meta`` describes."""
    m = meta["model"]
    return CharModel(
        len(meta["vocabulary"]), m["cell"], m["hidden_size"], m["num_layers"], m["dropout"]
    )


def load_weights(model: CharModel, tensors: dict[str, Tensor], name: Path | str) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"the checkpoint {name} does not fit this model") from error


def load_model(run: Path, name: str) -> tuple[CharModel, list[int], dict[str, Any]]:
    """The model of a run's checkpoint in eval mode, its vocabulary and its ``meta``.

    Raises:
        UserError: no such run or checkpoint, or a damaged one.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} is no run: it has no checkpoints")
    known = sorted(p.name for p in folder.iterdir() if "." not in p.name)
    if name == "best" and "best" not in known:
        name = "latest"  # a run without validation has no best one
    if name not in known:
        raise UserError(f"--checkpoint: expected one of {', '.join(known)}, got {name}")
    tensors, _, meta = checkpoint.load(folder / name)
    try:
        model = build_model(meta)
        vocabulary = [int(value) for value in meta["vocabulary"]]
        if not all(0 <= value < 256 for value in vocabulary):
            raise ValueError("vocabulary")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint {folder / name} describes no model of ours") from error
    load_weights(model, tensors, folder / name)
    return model.eval(), vocabulary, meta


def free_folder(root: Path = Path("runs")) -> Path:
    """runs/1, runs/2, ...: the first that does not exist."""
    number = 1
    while (root / str(number)).exists():
        number += 1
    return root / str(number)


class Run:
    """Writes a run's files; every one is whole at any moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: list[dict[str, Any]] = []
        self.plotted = -math.inf

    def start(self, config: Config, sha256: str) -> None:
        if (self.folder / "config.json").exists():
            raise UserError(f"--out: {self.folder} already holds a run; --resume goes on with it")
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            text = json.dumps({**asdict(config), "data_sha256": sha256}, indent=2)
            checkpoint.write_text(self.folder / "config.json", text + "\n")
        except OSError as error:
            raise UserError(f"--out: cannot write to {self.folder}: {error.strerror}") from error

    def read_config(self) -> tuple[dict[str, Any], str]:
        try:
            found = json.loads((self.folder / "config.json").read_text())
            return found, str(found.pop("data_sha256"))
        except FileNotFoundError:
            raise UserError(f"--resume: {self.folder} holds no run") from None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"--resume: {self.folder}/config.json is damaged") from error

    def cut_metrics(self, step: int) -> None:
        """Forget what was measured after the checkpoint that the run goes on from."""
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found = json.loads(line)
            except ValueError:  # the last line of a killed run
                break
            if found["step"] <= step:
                self.metrics.append(found)
        lines = [json.dumps(found) + "\n" for found in self.metrics]
        checkpoint.write_text(path, "".join(lines))

    def log(self, **values: Any) -> None:
        nats = values["val_loss"] if values["val_loss"] is not None else values["train_loss"]
        values["bpc"] = nats / math.log(2)
        self.metrics.append(values)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def save(
        self,
        name: str,
        model: CharModel,
        optimizer: torch.optim.Optimizer,
        hx: Any,
        meta: dict[str, Any],
    ) -> None:
        training = checkpoint.optimizer_tensors(optimizer)
        training["rng.cpu"] = torch.get_rng_state()
        if next(model.parameters()).is_cuda:
            training["rng.cuda"] = torch.cuda.get_rng_state()
        for j, x in enumerate(states(hx)):
            training[f"state.{j}"] = x.detach().contiguous()
        checkpoint.save(
            self.folder / "checkpoints" / name, model.state_dict(), training, {"format": 1, **meta}
        )

    def restore(
        self, model: CharModel, optimizer: torch.optim.Optimizer
    ) -> tuple[Any, dict[str, Any]]:
        """Load ``latest`` into model, optimizer and generators; the carried state and ``meta``."""
        name = self.folder / "checkpoints" / "latest"
        tensors, training, meta = checkpoint.load(name)
        load_weights(model, tensors, name)
        device = next(model.parameters()).device
        try:
            checkpoint.restore_optimizer(optimizer, training)
            torch.set_rng_state(training["rng.cpu"])
            if device.type == "cuda" and "rng.cuda" in training:
                torch.cuda.set_rng_state(training["rng.cuda"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"the checkpoint {name} does not fit this run") from error
        names = sorted(key for key in training if key.startswith("state."))
        return as_state([training[key].to(device) for key in names]), meta

    def plot(self, at_least_after: float = 0.0) -> None:
        """loss.png: training and validation loss over steps; not if drawn so many seconds ago."""
        if time.monotonic() - self.plotted < at_least_after:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        steps = [m["step"] for m in self.metrics]
        axes.plot(steps, [m["train_loss"] for m in self.metrics], lw=0.7, label="training")
        held = [m for m in self.metrics if m["val_loss"] is not None]
        if held:
            axes.plot(
                [m["step"] for m in held], [m["val_loss"] for m in held], "o-", label="validation"
            )
        axes.set(xlabel="step", ylabel="nats a character")
        axes.legend()
        axes.grid(alpha=0.3)
        temporary = self.folder / "loss.tmp.png"
        figure.savefig(temporary, dpi=120)
        temporary.replace(self.folder / "loss.png")
        self.plotted = time.monotonic()
