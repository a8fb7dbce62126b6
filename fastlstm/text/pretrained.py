"""Models in Hugging Face's convention: a folder of ``config.json`` and ``model.safetensors``.

The weights have the names and bytes of a checkpoint's ``model.safetensors``. ``metrics.jsonl``, the
history of the training, lies beside them where there is one.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from . import UserError
from .alphabet import Alphabet
from .files import write_text
from .model import ARCHITECTURE, CharModel, seen_of

CONFIG, WEIGHTS, HISTORY = "config.json", "model.safetensors", "metrics.jsonl"


def holds_one(folder: Path) -> bool:
    """Whether a folder is one of these, and no run's."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def write(
    folder: Path, model: CharModel, meta: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    """Write the files into a folder that holds none of them."""
    config = {name: meta["model"][name] for name in ARCHITECTURE} | {
        **Alphabet.of(meta).described(), "seen": seen_of(meta), "step": meta["step"],
    }  # fmt: skip
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    tensors = {key: value.detach().float().cpu().contiguous()  # whatever it computes in
               for key, value in model.state_dict().items()}  # fmt: skip
    save_file(tensors, folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)  # not for the owner alone
    if history:
        write_text(folder / HISTORY, "".join(json.dumps(line) + "\n" for line in history))


def load_meta(folder: Path) -> dict[str, Any]:
    """The ``meta`` that a checkpoint of the model would have.

    Raises:
        UserError: config.json cannot be read or is damaged or foreign.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    kinds = {"vocabulary": list, "seen": list, "unit": str, "step": int}
    for name, kind in kinds.items():
        value = config.get(name) if isinstance(config, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path} describes no model of ours: it lacks {name!r}")
    if not all(type(value) is int for value in config["seen"]):
        raise UserError(f"{path} describes no model of ours: its 'seen' is no list of numbers")
    return {**{name: config[name] for name in (*kinds, "merges") if name in config},
            "model": {name: config.get(name) for name in ARCHITECTURE}}  # fmt: skip


def load_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole; none where there is no file."""
    lines: list[dict[str, Any]] = []
    try:
        with open(folder / HISTORY, encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, RecursionError):  # of a run that trains, or was killed
                    entry = json.loads(line)
                    lines += [entry] if isinstance(entry, dict) else []
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot read {folder / HISTORY}: {error.strerror}") from error
    return lines
