"""Options from files, for ``--config``: JSON, TOML, and those of gpjt/karpathy-rnns-repro."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import UserError


def read_config_files(names: Sequence[str]) -> dict[str, Any]:
    """Options from JSON or TOML files, by the flags' names with ``_`` or ``-``; later files win.

    A run's own ``config.json`` is understood, and so are the ``model.json`` and ``train.json`` of
    gpjt/karpathy-rnns-repro. A folder stands for these two and, unless an option says otherwise,
    for its text at ``../../data/input.txt``.

    Raises:
        UserError: a file cannot be read or holds no table of options.
    """
    options: dict[str, Any] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            text = path / ".." / ".." / "data" / "input.txt"
            options |= {"data": str(text)} if text.exists() else {}
            for part in ("model.json", "train.json"):
                options |= _read_config_file(path / part)
        else:
            options |= _read_config_file(path)
    return options


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        # What Windows writes may begin with a mark of byte order.
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            try:
                import tomllib
            except ImportError:
                raise UserError("--config: TOML needs Python 3.11; write JSON instead") from None
            options = tomllib.loads(text)
        else:
            options = json.loads(text)
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config: {path} is not valid: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config: {path} holds no table of options")
    options = {key.replace("-", "_"): value for key, value in options.items()}
    options.pop("data_sha256", None)
    return _of_karpathy_rnns_repro(options) if "val_batch_percent" in options else options


def _of_karpathy_rnns_repro(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a ``train.json`` of gpjt/karpathy-rnns-repro by our names.

    It evaluates once an epoch, and neither clips nor stops early where it does not say so.
    """
    percent = options.pop("val_batch_percent")
    if type(percent) not in (int, float):
        raise UserError(f"--config: val_batch_percent: expected a number, got {percent!r}")
    if isinstance(options.get("optimizer"), str):
        options["optimizer"] = options["optimizer"].lower()
    return {
        "val_fraction": percent / 100,
        "clip_norm": options.pop("max_grad_norm", 0),
        "lr_schedule": "constant",
        "eval_every": 0,
        **options,
    }
