"""The models of runs, of checkpoints, and of ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import UserError, checkpoint, pretrained
from .model import CharModel, build


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
    return load_checkpoint(run / "checkpoints" / name)


def load_checkpoint(folder: Path) -> tuple[CharModel, list[int], dict[str, Any]]:
    """The same of a checkpoint's folder, wherever it lies.

    Raises:
        UserError: there is none, or it is damaged.
    """
    place, meta = checkpoint.load_meta(folder)
    model = build(meta, checkpoint.load_tensors(place, "model"), place)
    return model, meta["vocabulary"], meta


def load_pretrained(folder: Path) -> tuple[CharModel, list[int], dict[str, Any]]:
    """The same of a folder that ``save_pretrained`` wrote.

    Raises:
        UserError: it is damaged.
    """
    meta = pretrained.load_meta(folder)
    model = build(meta, checkpoint.load_tensors(folder, "model"), folder)
    return model, meta["vocabulary"], meta


def open_model(path: str, name: str | None) -> tuple[Path, CharModel, list[int], dict[str, Any]]:
    """The run's folder (a checkpoint's, where it lies in no run), model, vocabulary and ``meta``.

    Args:
        path: a run's folder, that of one of its checkpoints, or one of ``save_pretrained``.
        name: of the run's checkpoint; None is the best, or the latest where none is the best.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or ``name`` is another one.
    """
    folder = Path(path).resolve()
    in_run = folder.parent.name == "checkpoints" and not (folder / "checkpoints").is_dir()
    if pretrained.holds_one(folder):
        if name is not None:
            raise UserError(f"checkpoint {name}: {path} holds one model, and no checkpoints")
        return folder, *load_pretrained(folder)
    if not (in_run or (folder / "meta.json").is_file()):
        return Path(path), *load_model(Path(path), name or "best")
    if name not in (None, folder.name):
        raise UserError(f"checkpoint {name}: {path} is the checkpoint {folder.name}")
    if not in_run:
        return folder, *load_checkpoint(folder)
    return folder.parents[1], *load_model(folder.parents[1], folder.name)
