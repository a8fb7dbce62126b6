"""The model that a command was given: by a run's folder, or by a checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import UserError
from .model import CharModel
from .run import load_checkpoint, load_model


def open_model(given: str, name: str | None) -> tuple[Path, CharModel, list[int], dict[str, Any]]:
    """The run's folder (a checkpoint's, where it lies in no run), model, vocabulary and ``meta``.

    Args:
        given: a run's folder, or that of one of its checkpoints.
        name: of the run's checkpoint; None is the best, or the latest where none is the best.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or ``name`` is another one.
    """
    folder = Path(given).resolve()
    in_run = folder.parent.name == "checkpoints" and not (folder / "checkpoints").is_dir()
    if not (in_run or (folder / "meta.json").is_file()):
        return Path(given), *load_model(Path(given), name or "best")
    if name not in (None, folder.name):
        raise UserError(f"--checkpoint {name}: {given} is the checkpoint {folder.name}")
    if not in_run:
        return folder, *load_checkpoint(folder)
    return folder.parents[1], *load_model(folder.parents[1], folder.name)
