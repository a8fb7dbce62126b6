"""The trainer's options: flags, config files, defaults, and what may change on ``--resume``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from . import UserError
from .model import CELLS


@dataclass
class Config:
    """One training run; ``config.json`` holds it."""

    data: list[str] = field(default_factory=lambda: ["stdlib"])
    cell: str = "lstm"
    hidden_size: int = 256
    num_layers: int = 2
    dropout: float = 0.0
    batch_size: int = 32
    seq_length: int = 64
    optimizer: str = "adam"
    lr: float = 4e-3
    lr_schedule: str = "cosine"
    warmup: int = 50
    clip_norm: float = 5.0
    epochs: int = 0
    steps: int = 1500
    patience: int = 0
    val_fraction: float = 0.05
    test_fraction: float = 0.0
    eval_every: int = 500
    sample_every: int = 500
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0
    unit: str = "byte"


KARPATHY = {
    "hidden_size": 512, "num_layers": 2, "dropout": 0.5, "batch_size": 100, "seq_length": 100,
    "optimizer": "adam", "lr": 2e-3, "lr_schedule": "constant", "warmup": 0, "clip_norm": 5.0,
}  # fmt: skip

CHOICES = {
    "cell": CELLS,
    "optimizer": ("adam", "adamw", "rmsprop"),
    "lr_schedule": ("constant", "cosine", "step"),
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "unit": ("byte", "char"),
}
# What a resumed run may not change, for it would no longer be the same run.
FIXED = (
    "data", "cell", "hidden_size", "num_layers", "dropout", "batch_size", "seq_length",
    "optimizer", "val_fraction", "test_fraction", "precision", "seed", "unit",
)  # fmt: skip

HELP = {
    "data": "file, folder, glob, -, URL, or a name: stdlib (default), shakespeare",
    "cell": "lstm is fastlstm.LSTM; the others are torch's own modules",
    "dropout": "probability of dropping an element after every layer",
    "batch_size": "number of parallel streams of text",
    "seq_length": "steps of truncated backpropagation through time",
    "warmup": "steps over which the learning rate rises",
    "clip_norm": "largest norm of the gradient; 0 for no limit",
    "epochs": "stop after so many passes over the text",
    "steps": "stop after so many steps",
    "patience": "stop after so many evaluations without a better validation loss; 0: never",
    "val_fraction": "held-out tail of the text",
    "test_fraction": "held-out tail after the validation part, scored once at the end",
    "eval_every": "steps between evaluations and checkpoints",
    "sample_every": "steps between printed samples; 0: none",
    "device": "auto, cpu, cuda, cuda:1, ...",
    "unit": "what a character is",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastlstm.train",
        description="Train a character-level language model. Without arguments: about three "
        "minutes on two cores, on the source text of Python's standard library.",
        argument_default=argparse.SUPPRESS,
    )
    run = p.add_argument_group("the run")
    run.add_argument("--out", metavar="RUN", help="run folder (default: runs/ and a free name)")
    run.add_argument("--preset", choices=["karpathy"], help="2x512, dropout 0.5, batch 100 x 100")
    run.add_argument("--config", metavar="FILE", help="JSON or TOML file with these options")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--init-from", metavar="RUN", help="start from another run's weights")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    options = p.add_argument_group("options, kept in the run's config.json")
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        default = Config().__dict__[f.name]
        text = HELP.get(f.name, "") + (f" (default: {default})" if f.name != "data" else "")
        if f.name == "data":
            options.add_argument(flag, nargs="+", metavar="SPEC", help=text)
        elif f.name in CHOICES:
            options.add_argument(flag, choices=CHOICES[f.name], help=text.strip())
        else:
            kind = type(default)
            options.add_argument(
                flag, type=kind, metavar=f.name[0].upper() if kind is not str else "D", help=text
            )
    return p


def read_config_file(name: str) -> dict[str, Any]:
    """Options from a JSON or TOML file, by the flags' names with ``_`` or ``-``."""
    path = Path(name)
    try:
        text = path.read_text()
        if path.suffix == ".toml":
            try:
                import tomllib
            except ImportError as error:
                raise UserError("--config: TOML needs Python 3.11; write JSON instead") from error
            found = tomllib.loads(text)
        else:
            found = json.loads(text)
    except OSError as error:
        raise UserError(f"--config: cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config: {name} is not valid: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--config: {name} holds no table of options")
    return {key.replace("-", "_"): value for key, value in found.items()}


def checked(values: dict[str, Any], source: str) -> dict[str, Any]:
    """``values`` with their types and ranges verified."""
    known = {f.name: type(Config().__dict__[f.name]) for f in fields(Config)}
    found = {}
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if name not in known:
            raise UserError(f"{source}: unknown option {name!r}")
        kind = known[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if name == "data" and isinstance(value, str):
            value = [value]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{flag}: expected {kind.__name__}, got {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{flag}: expected one of {', '.join(CHOICES[name])}, got {value!r}")
        at_least_one = ("hidden_size", "num_layers", "batch_size", "seq_length", "eval_every")
        if name in at_least_one and value < 1:
            raise UserError(f"{flag}: expected at least 1, got {value}")
        if kind in (int, float) and (value < 0 or not math.isfinite(value)):
            raise UserError(f"{flag}: expected a number that is not negative, got {value}")
        if name == "lr" and value == 0:
            raise UserError(f"{flag}: expected a positive number, got {value}")
        if name == "dropout" and value > 1:
            raise UserError(f"{flag}: expected a probability, got {value}")
        found[name] = value
    if found.get("unit") == "char":
        raise UserError("--unit char is not available yet; byte reads every text, UTF-8 included")
    return found


def parse(argv: Sequence[str] | None, on_gpu: bool) -> tuple[Config, set[str], argparse.Namespace]:
    """Options from defaults, preset, config file and flags, the later ones winning.

    Returns:
        The config, the names that the user gave, and the arguments that are no part of it.
    """
    arguments = parser().parse_args(argv)
    values = vars(arguments)
    names = {f.name for f in fields(Config)}
    rest = {key: values.pop(key) for key in list(values) if key not in names}
    base = asdict(Config())
    if on_gpu:
        base.update(KARPATHY)
    given: dict[str, Any] = {}
    if rest.get("preset") == "karpathy":
        given.update(KARPATHY)
    if "config" in rest:
        given.update(checked(read_config_file(rest["config"]), "--config"))
    given.update(checked(values, "the command line"))
    if "epochs" in given and "steps" not in given:
        base["steps"] = 0
    config = Config(**{**base, **given})
    if config.steps == 0 and config.epochs == 0:
        raise UserError("--steps 0: expected at least 1 (or --epochs)")
    if config.val_fraction + config.test_fraction >= 0.9:
        raise UserError("--val-fraction and --test-fraction leave too little to train on")
    others = {"out": None, "resume": False, "init_from": None, "compile": False, **rest}
    return config, set(given), argparse.Namespace(**others)
