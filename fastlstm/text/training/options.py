"""The trainer's options: flags, defaults, what each takes, and what may change on ``--resume``."""

from __future__ import annotations

import argparse
import math
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import UserError
from ..alphabet import UNITS
from ..cli import Parser, suggestion
from ..model import CELLS
from .config_files import read_config_files

VOCABULARY = 512  # tokens


@dataclass
class Config:
    """One training run; ``config.json`` in its folder holds it."""

    data: list[str] = field(default_factory=lambda: ["stdlib"])
    unit: str = "byte"
    vocabulary: int | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.0
    cell: str = "lstm"
    hidden_size: int = 256
    num_layers: int = 2
    dropout: float = 0.0
    batch_size: int = 32
    seq_length: int = 64
    optimizer: str = "adam"
    lr: float = 2e-3
    lr_schedule: str = "constant"
    warmup: int = 0
    weight_decay: float | None = None
    clip_norm: float = 5.0
    steps: int | None = None
    epochs: int | None = None
    patience: int = 0
    eval_every: int = 500
    sample_every: int = 500
    precision: str = "auto"
    compile: bool = False
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    device: str = "auto"
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """The options by their names; ``vocabulary`` only where the text's unit has one."""
        return {name: value for name, value in asdict(self).items()
                if name != "vocabulary" or self.unit == "bpe"}  # fmt: skip


@dataclass
class Option:
    """What is to know about an option beside its type and default.

    Attributes:
        least, below, above: bounds of a number; the latter two are excluded themselves.
        fixed: a resumed run may not change it, for it would no longer be the same run.
    """

    group: str
    metavar: str | None
    help: str
    choices: tuple[str, ...] | None = None
    least: float | None = None
    below: float | None = None
    above: float | None = None
    fixed: bool = False


OPTIONS = {
    "data": Option(
        "text", "SPEC", "files, folders, globs, URLs, - for standard input, or a name: stdlib "
        "(Python's own standard library), shakespeare",
    ),
    "unit": Option(
        "text", None, "what a character is; bpe: tokens of several bytes, learned from the text "
        "(byte-pair encoding)", tuple(UNITS), fixed=True,
    ),
    "vocabulary": Option(
        "text", "N", f"tokens that --unit bpe learns, at most (default: {VOCABULARY})",
        least=257, below=65537, fixed=True,
    ),
    "val_fraction": Option(
        "text", "X", "held-out tail of the text, to validate on", least=0, below=1, fixed=True
    ),
    "test_fraction": Option(
        "text", "X", "tail behind that, scored once at the end", least=0, below=1, fixed=True
    ),
    "cell": Option(
        "model", None, "lstm is fastlstm.LSTM, the others are torch's own", tuple(CELLS), fixed=True
    ),
    "hidden_size": Option("model", "H", "units of a layer", least=1, fixed=True),
    "num_layers": Option("model", "L", "layers", least=1, fixed=True),
    "dropout": Option(
        "model", "P", "probability of dropping an element after every layer",
        least=0, below=1, fixed=True,
    ),
    "batch_size": Option(
        "training", "B", "parallel streams of text; the default shrinks to fit a short text",
        least=1, fixed=True,
    ),
    "seq_length": Option(
        "training", "T", "characters that gradients flow back through", least=1, fixed=True
    ),
    "optimizer": Option("training", None, "", ("adam", "adamw", "rmsprop"), fixed=True),
    "lr": Option("training", "X", "learning rate", above=0),
    "lr_schedule": Option(
        "training", None, "cosine falls to a hundredth at the end of the run; step falls by 3 "
        "percent an epoch after ten, as in char-rnn", ("constant", "cosine", "step"),
    ),
    "warmup": Option("training", "N", "steps over which the rate rises", least=0),
    "weight_decay": Option(
        "training", "X", "of the optimizer (default: its own, 0.01 for adamw, else 0)", least=0
    ),
    "clip_norm": Option("training", "X", "largest norm of the gradient, 0: no limit", least=0),
    "steps": Option("length", "N", "stop after N steps", least=1),
    "epochs": Option("length", "N", "stop after N passes over the text", least=1),
    "patience": Option(
        "length", "N", "stop after N evaluations without a better validation loss, 0: never",
        least=0,
    ),
    "eval_every": Option(
        "length", "N", "steps between evaluations, each with a checkpoint; 0: one an epoch",
        least=0,
    ),
    "sample_every": Option("length", "N", "steps between samples, 0: none", least=0),
    "precision": Option(
        "machine", None, "auto: bf16 where the processor multiplies it and the cell is lstm, else "
        "tf32 on a GPU and fp32 on a CPU; tf32 and fp16 need a GPU; bf16 and fp16 keep float32 "
        "weights", ("auto", "fp32", "tf32", "bf16", "fp16"), fixed=True,
    ),
    "compile": Option("machine", None, "let torch.compile build the model; needs a C++ compiler"),
    "tensorboard": Option("run", None, "write events to RUN/tensorboard as well"),
    "wandb": Option("run", None, "log to Weights & Biases as well"),
    "trackio": Option("run", None, "log to Trackio as well"),
    "device": Option("machine", "D", "auto, cpu, cuda, cuda:1, ..."),
    "seed": Option("machine", "N", "of weights, dropout and samples", least=0, fixed=True),
}  # fmt: skip

# Where neither --steps nor --epochs is given: on a CPU, one to three minutes on two cores.
QUICK: dict[str, Any] = {"steps": 1500, "lr": 4e-3, "lr_schedule": "cosine", "warmup": 50}
# The char-rnn of "The Unreasonable Effectiveness of Recurrent Neural Networks"; also a GPU's.
KARPATHY: dict[str, Any] = {
    "hidden_size": 512, "num_layers": 2, "dropout": 0.5, "batch_size": 100, "seq_length": 100,
    "lr": 2e-3, "lr_schedule": "step", "clip_norm": 5.0, "epochs": 50,
}  # fmt: skip

_TYPES = typing.get_type_hints(Config)
_EXPECTED = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@dataclass
class Request:
    """What the user asked for: the config, which of its options they gave, and the rest.

    Attributes:
        config: with every default filled in.
        explicit: the options that came from a flag, a config file or a preset.
        out, resume, init_from: the flags that are no part of a run's config.
    """

    config: Config
    explicit: set[str]
    out: str | None
    resume: bool
    init_from: str | None


def parse(argv: Sequence[str] | None, on_gpu: bool) -> Request:
    """Options from defaults, preset, config file and flags, the later ones winning.

    Raises:
        UserError: an unknown option, a value out of its range, something not available yet.
    """
    values = vars(_parser().parse_args(argv))
    resume = values.pop("resume", False)
    file = read_config_files(values.pop("config", []))
    if values.get("unit", "bpe") != "bpe":  # the flag wins, so the file's tokens are not wanted
        file.pop("vocabulary", None)
    paths = {name: values.pop(name, file.pop(name, None)) for name in ("out", "init_from")}
    preset = values.pop("preset", file.pop("preset", None))
    if preset not in (None, "karpathy"):
        raise UserError(f"--preset: expected karpathy, got {preset!r}")
    for name, value in paths.items():
        if value is not None and not _is_path(value):
            raise UserError(f"{_flag(name)}: expected a path in UTF-8, got {value!r}")
    explicit = {**checked(file, "--config: "), **checked(values)}
    explicit = {name: value for name, value in explicit.items() if value is not None}  # JSON's null
    length = explicit.keys() & {"steps", "epochs"}
    if preset:
        explicit = {**(_without_length(KARPATHY) if length else KARPATHY), **explicit}
    base: dict[str, Any] = {}
    if not resume and not preset:
        on_gpu = on_gpu and not explicit.get("device", "auto").startswith("cpu")
        base = KARPATHY if on_gpu else {} if length else QUICK
        base = _without_length(base) if length else base
    config = Config(**{**base, **explicit})
    if config.val_fraction + config.test_fraction >= 1:
        raise UserError("--val-fraction and --test-fraction leave nothing to train on")
    elsewhere = resume or paths["init_from"] is not None  # a run that knows its unit
    if config.unit == "bpe":
        config.vocabulary = config.vocabulary or VOCABULARY
    elif config.vocabulary is not None and not elsewhere:
        raise UserError(
            f"--vocabulary {config.vocabulary}: only --unit bpe learns one, the unit is "
            f"{config.unit}"
        )
    if resume and paths["out"] is None:
        raise UserError("--resume needs --out RUN, the run to go on with")
    if resume and paths["init_from"] is not None:
        raise UserError("--resume goes on from its own weights: give it without --init-from")
    return Request(config, set(explicit), paths["out"], resume, paths["init_from"])


def resumed(request: Request, stored: dict[str, Any], source: str) -> Config:
    """The config of a stored run, with what was given again or may change.

    Raises:
        UserError: something given disagrees with the run, or ``stored`` is no config.
    """
    config = Config(**checked(stored, f"{source}: "))
    for name in OPTIONS:
        if name not in request.explicit or name == "data":  # its checksum tells the text
            continue
        mine, theirs = getattr(request.config, name), getattr(config, name)
        if name == "precision" and mine == "auto":  # the run keeps what it chose
            continue
        if OPTIONS[name].fixed and mine != theirs:
            raise UserError(
                f"{_flag(name)} {mine} disagrees with the run to resume, which has "
                f"{'none' if theirs is None else theirs}"
            )
        setattr(config, name, mine)
    if "data" in request.explicit:
        config.data = request.config.data
    if request.explicit & {"steps", "epochs"}:  # a new length replaces the old one
        config.steps, config.epochs = request.config.steps, request.config.epochs
    return config


def checked(values: dict[str, Any], source: str = "") -> dict[str, Any]:
    """``values`` by their options' names, with types and ranges verified.

    Args:
        source: what errors begin with.

    Raises:
        UserError: an unknown name or a value that its option does not take.
    """
    options = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in OPTIONS:
            raise UserError(f"{source}unknown option {key!r}{suggestion(name, OPTIONS)}")
        if name == "data" and isinstance(value, str):
            value = [value]
        try:
            options[name] = _checked(name, value)
        except UserError as error:
            raise UserError(f"{source}{error}") from None
    return options


def _checked(name: str, value: Any) -> Any:
    kind, rules = _TYPES[name], OPTIONS[name]

    def refuse(expected: str) -> typing.NoReturn:
        raise UserError(f"{_flag(name)}: expected {expected}, got {value!r}")

    if name == "data":
        named = isinstance(value, list) and all(isinstance(v, str) and v for v in value)
        if not (named and value):
            refuse("texts' names")
        return value
    if type(None) in typing.get_args(kind):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**63 else math.inf
    if type(value) is not kind:
        refuse(_EXPECTED[kind])
    if rules.choices and value not in rules.choices:
        refuse(f"one of {', '.join(rules.choices)}")
    if kind is float and not math.isfinite(value):
        refuse("a finite number")
    if kind is int and value >= 2**63:
        refuse("a number below 2^63")
    if rules.least is not None and value < rules.least:
        refuse(f"at least {rules.least}")
    if rules.above is not None and value <= rules.above:
        refuse(f"a number above {rules.above}")
    if rules.below is not None and value >= rules.below:
        refuse(f"a number below {rules.below}")
    return value


def _is_path(value: Any) -> bool:
    """Whether it names a file; safetensors opens none whose name is no UTF-8."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_length(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("steps", "epochs")}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        "train",
        description="Train a character-level language model on any text. Without arguments: one "
        "to three minutes on two cores, on the source text of Python's standard library.",
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: p.add_argument_group(name)
              for name in ("run", "text", "model", "training", "length", "machine")}  # fmt: skip
    run = groups["run"]
    run.add_argument("--out", metavar="RUN", help="folder of the run (default: a new one in runs/)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--init-from", metavar="RUN", help="begin with another run's weights: its "
                     "best checkpoint's, or those in a checkpoint's folder")  # fmt: skip
    run.add_argument("--config", metavar="FILE", nargs="+", action="extend",
                     help="JSON or TOML files of options, or a folder that holds the model.json "
                     "and train.json of karpathy-rnns-repro; flags win")  # fmt: skip
    run.add_argument("--preset", choices=["karpathy"],
                     help="char-rnn's: 2x512, dropout 0.5, batch 100, length 100")  # fmt: skip
    for name, default in asdict(Config()).items():
        rules, kind = OPTIONS[name], _TYPES[name]
        shown = " ".join(default) if name == "data" else default
        text = rules.help
        if shown is not None:
            elsewhere = ((KARPATHY, "on a GPU"), (QUICK, "where no length is given"))
            other = [f"{values[name]} {where}" for values, where in elsewhere
                     if values.get(name, shown) != shown]  # fmt: skip
            text += f" (default: {', '.join([str(shown), *other])})"
        if kind is bool:
            groups[rules.group].add_argument(
                _flag(name), action=argparse.BooleanOptionalAction, help=rules.help
            )
            continue
        several: dict[str, Any] = {"nargs": "+", "action": "extend"} if name == "data" else {}
        groups[rules.group].add_argument(
            _flag(name),
            type=str if name == "data" else (*typing.get_args(kind), kind)[0],
            choices=rules.choices,
            metavar=rules.metavar,
            help=text.strip(),
            **several,
        )
    return p
