"""Character-level models: :func:`load` a trained one. The commands are made of what is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import torch

    from .text_model import TextModel

__all__ = ["TextModel", "UserError", "load"]


class UserError(Exception):
    """A mistake of the user's; a command answers it with one line and exit status 2."""


def load(
    path: str | os.PathLike[str],
    checkpoint: str | None = None,
    *,
    device: str | torch.device = "cpu",
) -> TextModel:
    """The trained model of a run.

    Args:
        path: a run's folder, that of one of its checkpoints, or one of ``save_pretrained``.
        checkpoint: of the run: "best", "latest" or "epoch-N". By default the best, or the latest
            where the run had no text to validate on.
        device: where the model goes; "auto" is a GPU where there is one.

    Raises:
        UserError: there is no such run, checkpoint or device, or a file is damaged.
        ImportError: a package that the models need is missing.
    """
    return _text_model().load(path, checkpoint, device=device)


def _text_model() -> type[TextModel]:
    try:
        from .text_model import TextModel
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "safetensors":
            raise
        raise ImportError(
            "fastlstm.text: safetensors is not installed: pip install 'fastlstm[text]'"
        ) from error
    return TextModel


def __getattr__(name: str) -> Any:
    """``TextModel``, imported when it is asked for: the commands start without it."""
    if name == "TextModel":
        return _text_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
