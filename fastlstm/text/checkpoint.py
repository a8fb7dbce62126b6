"""Checkpoints as safetensors and JSON: nothing in them can run code, and each is written whole.

A checkpoint is a folder of ``model.safetensors``, ``training.safetensors`` (optimizer, random
generators, carried state) and ``meta.json``. A new one is written in full beside the old one, and
the two then change places. Linux does that in one step; elsewhere the old one is renamed aside
first, and :func:`existing` finds it there if the process is killed in between.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import UserError
from .files import write_text

META = {"format": int, "step": int, "position": int, "epoch": int, "vocabulary": list,
        "unit": str, "model": dict}  # fmt: skip


def save(
    folder: Path, model: dict[str, Tensor], training: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write a checkpoint, or replace one, so that at any moment a whole one exists.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older checkpoint is kept.
    """
    fresh, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write_text(fresh / "meta.json", json.dumps(meta, indent=2) + "\n")
        mode = stat.S_IMODE((fresh / "meta.json").stat().st_mode)
        for name, tensors in (("model", model), ("training", training)):
            stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            path = fresh / f"{name}.safetensors"
            save_file(stored, path)
            if stat.S_IMODE(path.stat().st_mode) != mode:  # safetensors lets the owner alone read
                path.chmod(mode)
            _sync(path)
        _sync(fresh)
        if not folder.exists():
            os.rename(fresh, folder)
        elif _exchange(fresh, folder):
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            os.rename(fresh, folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(number, reason, str(folder)) from error


def existing(folder: Path) -> Path | None:
    """Where the checkpoint of that name is now, or None."""
    return next((path for path in (folder, _beside(folder, "old")) if path.is_dir()), None)


def names(checkpoints: Path) -> list[str]:
    """The checkpoints in a run's folder of them, sorted; epochs in their order.

    Raises:
        UserError: the folder may not be read.
    """
    try:
        entries = os.listdir(checkpoints)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read {checkpoints}: {error.strerror}") from error
    whole = {name.removeprefix(".").removesuffix(".old") for name in entries if ".new" not in name}
    whole = {name for name in whole if existing(checkpoints / name)}
    return sorted(whole, key=lambda name: (len(name) if name.startswith("epoch-") else 0, name))


def load_meta(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the checkpoint is, and its ``meta.json``, with the types of what it must hold checked.

    Raises:
        UserError: there is none, it may not be read, or it is damaged or foreign.
    """
    try:
        place = existing(folder)
        if place is None:
            raise UserError(f"there is no checkpoint {folder}")
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the checkpoint {folder} is damaged: meta.json: {error}") from error
    for name, kind in META.items():
        value = meta.get(name) if isinstance(meta, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"the checkpoint {folder} is not one of ours: meta.json lacks {name!r}")
    seen = meta.get("seen", [])
    if not (isinstance(seen, list) and all(type(value) is int for value in seen)):
        raise UserError(
            f"the checkpoint {folder} is not one of ours: its 'seen' is no list of numbers"
        )
    if meta["format"] != 1:
        raise UserError(f"the checkpoint {folder} was written by a newer fastlstm")
    return place, meta


def load_tensors(place: Path, name: str) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors`` or ``training.safetensors``, on the CPU.

    Raises:
        UserError: the file is missing, may not be read, is damaged or no safetensors file.
    """
    path = place / f"{name}.safetensors"
    try:
        with open(path, "rb"):  # safetensors reports an unreadable file as a missing one
            pass
        return load_file(path)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the checkpoint {place} is damaged: {name}.safetensors: {error}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    tensors = {}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"optimizer.{number}.{key}"] = torch.as_tensor(value)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what :func:`optimizer_tensors` gave.

    Raises:
        ValueError: the tensors belong to another model or optimizer.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, place, key = name.split(".", 2)
            state.setdefault(int(place), {})[key] = value.clone()  # not the mapped file
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = {"step", *_MOMENTS[type(optimizer)]}
    if state and set(state) != set(range(len(parameters))):
        raise ValueError("it holds the optimizer of another model")
    for number, values in state.items():
        if set(values) != wanted:
            raise ValueError("it holds another kind of optimizer")
        for key, value in values.items():
            shape = [] if key == "step" else list(parameters[number].shape)
            if list(value.shape) != shape or value.dtype != torch.float32:
                raise ValueError(f"its optimizer.{number}.{key} has the wrong shape or dtype")
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)


_MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.RMSprop: ("square_avg",),
}


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system does it for folders
            os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step, where the system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), both) == 0
