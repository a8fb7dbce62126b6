"""Options from files, for ``--config``: JSON, TOML, and those of gpjt/karpathy-rnns-repro."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import UserError


def read_config_files(names: Sequence[str]) -> dict[str, Any]:
    """Options from JSON or TOML files, by the flags' names with ``_`` or ``-``; later files win.

    A run's own ``config.json`` is understood, and so are the ``model.json`` and ``train.json`` of
    gpjt/karpathy-rnns-repro. A folder stands for these two and, unless an option says otherwise,
    for its text at ``../../data/input.txt``.

    Raises:
        UserError: a file cannot be read or holds no table of options.
    """
    found: dict[str, Any] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            text = path / ".." / ".." / "data" / "input.txt"
            found |= {"data": str(text)} if text.exists() else {}
            for part in ("model.json", "train.json"):
                found |= _read_config_file(path / part)
        else:
            found |= _read_config_file(path)
    return found


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            try:
                import tomllib
            except ImportError:
                raise UserError("--config: TOML needs Python 3.11; write JSON instead") from None
            found = tomllib.loads(text)
        else:
            found = json.loads(text)
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config: {path} is not valid: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--config: {path} holds no table of options")
    found = {key.replace("-", "_"): value for key, value in found.items()}
    found.pop("data_sha256", None)
    return _of_karpathy_rnns_repro(found) if "val_batch_percent" in found else found


def _of_karpathy_rnns_repro(found: dict[str, Any]) -> dict[str, Any]:
    """The options of a ``train.json`` of gpjt/karpathy-rnns-repro by our names.

    It evaluates once an epoch, and neither clips nor stops early where it does not say so.
    """
    percent = found.pop("val_batch_percent")
    if type(percent) not in (int, float):
        raise UserError(f"--config: val_batch_percent: expected a number, got {percent!r}")
    if isinstance(found.get("optimizer"), str):
        found["optimizer"] = found["optimizer"].lower()
    return {
        "val_fraction": percent / 100,
        "clip_norm": found.pop("max_grad_norm", 0),
        "lr_schedule": "constant",
        "eval_every": 0,
        **found,
    }
