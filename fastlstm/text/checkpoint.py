"""Checkpoints as safetensors and JSON: nothing in them can execute code, none is ever half there.

A checkpoint is a folder: ``model.safetensors``, ``training.safetensors`` (optimizer, generator
and carried state) and ``meta.json``. It is written under another name and renamed; the one that it
replaces is moved aside first and found again by :func:`load` if the run is killed in between.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import UserError


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(
    folder: Path, model: dict[str, Tensor], training: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write a checkpoint so that at any moment a whole one exists."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in model.items()}, fresh / "model.safetensors")
    save_file(training, fresh / "training.safetensors")
    write_text(fresh / "meta.json", json.dumps(meta, indent=2) + "\n")
    for name in ("model.safetensors", "training.safetensors"):
        with open(fresh / name, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read ``model``, ``training`` and ``meta`` back.

    Raises:
        UserError: there is none, or it is damaged or foreign.
    """
    if not folder.exists():
        old = folder.with_name(folder.name + ".old")  # killed between two renames
        if not old.exists():
            raise UserError(f"there is no checkpoint {folder}")
        folder = old
    try:
        meta = json.loads((folder / "meta.json").read_text())
        model = load_file(folder / "model.safetensors")
        training = load_file(folder / "training.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the checkpoint {folder} is damaged or not one of ours: {first}"
        ) from error
    wanted = {"format": int, "step": int, "vocabulary": list, "model": dict, "position": int}
    for name, kind in wanted.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(name), kind):
            raise UserError(f"the checkpoint {folder} is not one of ours: meta.json lacks {name!r}")
    return model, training, meta


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    found = {}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            found[f"optimizer.{number}.{key}"] = torch.as_tensor(value).contiguous()
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what :func:`optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
