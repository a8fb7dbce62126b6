"""A trained model as a Python object: ``fastlstm.text.load("runs/mine")``."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..generation.draw import Draw
from . import UserError, pretrained, sampling
from .alphabet import UNITS, Alphabet, note_of_unknown
from .devices import pick_device
from .hub import Hub, require
from .model import CharModel
from .opening import open_model

CARD = """---
{{ card_data }}
---

# A character-level language model

```python
import fastlstm

model = fastlstm.text.TextModel.from_pretrained("REPOSITORY")
print(model.sample(300, temperature=0.8))
```
"""


class TextModel(
    nn.Module,
    Hub,
    library_name="fastlstm",
    pipeline_tag="text-generation",
    tags=["lstm", "char-rnn"],
    model_card_template=CARD,
):
    """A trained character-level model, with all that using it takes.

    Args:
        model: the recurrent stack and its output layer.
        meta: of its checkpoint.

    Attributes:
        model: int64 ``(T, B)`` and a state to logits ``(T, B, V)`` and the state behind them.
        alphabet: turns text into indices and back.
        history: an object a training step, as metrics.jsonl has them.
    """

    def __init__(self, model: CharModel, meta: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.meta = model, meta
        self.alphabet = Alphabet.of(meta)
        self.history: list[dict[str, Any]] = []

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        checkpoint: str | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> TextModel:
        """What :func:`fastlstm.text.load` gives."""
        folder, model, _, meta = open_model(os.fspath(path), checkpoint)
        text_model = cls(model.to(pick_device(str(device), argument="device")), meta)
        text_model.history = pretrained.load_history(folder)
        return text_model.eval()

    @property
    def vocabulary(self) -> list[int]:
        """Byte values, code points of Unicode, or tokens' numbers, in the order of the logits."""
        return self.alphabet.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.decoder.weight.device

    def forward(self, indices: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """int64 ``(T, B)`` to logits ``(T, B, V)``, and the state after the last step."""
        return self.model(indices, hx)

    def sample(
        self,
        length: int = 500,
        *,
        primer: str | bytes = "",
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | None = None,
        weights: str = "fp32",
    ) -> str:
        """A text, the one that ``python -m fastlstm.sample`` prints for the same values.

        Args:
            length: characters to draw; bytes or tokens, for a model of these.
            primer: what the text begins with.
            temperature: below 1 safer, above 1 wilder, 0 always the likeliest.
            top_k: draw from the k likeliest characters.
            top_p: draw from the likeliest of total probability p.
            seed: the same seed gives the same text.
            stop: the text ends before this string.
            weights: how they are stored meanwhile: "fp32", "bf16" or "int8".

        Returns:
            The primer and what was drawn.

        Raises:
            TypeError, ValueError: an argument is not what it should be.
        """
        for name, value, least in (("length", length, 1), ("seed", seed, 0)):
            if not (type(value) is int and least <= value < 2**63):
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
        if not (stop is None or (isinstance(stop, str) and stop)):
            raise ValueError(f"stop must be a string that is not empty, or None, got {stop!r}")
        if weights not in ("fp32", "bf16", "int8"):
            raise ValueError(f"weights must be 'fp32', 'bf16' or 'int8', got {weights!r}")
        draw = Draw(temperature, top_k, top_p, torch.tensor([seed]))
        draw.check()
        data = _encoded("primer", primer)
        prime, unknown = self.alphabet.prime(data)
        self._warn_of("primer", unknown)
        with self._evaluating():
            pieces = sampling.stream_text(
                self.model, self.alphabet, prime.to(self.device), length, draw,
                weights=weights, stop=stop,
            )  # fmt: skip
            return data.decode(errors="replace") + "".join(pieces)

    def logits(self, text: str | bytes) -> Tensor:
        """float32 ``(T, V)``: after each character of a text, logits of the next one.

        Characters that the model does not know are skipped, with a warning.

        Raises:
            UserError: the model knows no character of the text.
        """
        indices = self._known(text, 1)
        with self._evaluating(), torch.inference_mode():
            logits, _ = self.model(indices)
        return logits[:, 0].float()

    def score(self, text: str | bytes) -> float:
        """Mean loss in nats a character, or token; divided by ln 2 it is in bits.

        Models of different units compare by :meth:`bits_per_byte`. The first character is given,
        not predicted. Characters that the model does not know are skipped, with a warning.

        Raises:
            UserError: the model knows less than two characters of the text.
        """
        indices = self._known(text, 2)
        with self._evaluating():
            return sampling.score(self.model, indices)

    def bits_per_byte(self, text: str | bytes) -> float:
        """Mean loss in bits a byte of the text, by which models of all units compare.

        The first character or token is given: neither it nor its bytes count. Characters that the
        model does not know are skipped, with a warning, and do not count either.

        Raises:
            UserError: the model knows less than two characters of the text.
        """
        indices = self._known(text, 2)
        with self._evaluating():
            nats = sampling.score(self.model, indices)
        return self.alphabet.bits_a_byte(nats, indices[1:])

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write the model for :meth:`from_pretrained`; a model card that is there is kept.

        Every file is written beside the one that it replaces.

        Args:
            save_directory: the folder, made where there is none.
            options: those of ``PyTorchModelHubMixin.save_pretrained``.

        Returns:
            Where ``push_to_hub=True`` is among the options, the address of the commit.

        Raises:
            UserError: the folder is a run's, whose config.json would be lost.
            ImportError: huggingface_hub is missing.
            OSError: the folder cannot be written.
        """
        require("save_pretrained")
        push, repository = options.pop("push_to_hub", False), options.pop("repo_id", None)
        card = {"model_card_kwargs": options.pop("model_card_kwargs", None)}
        options.pop("config", None)  # ours says what from_pretrained needs
        folder = Path(save_directory)
        if (folder / "checkpoints").is_dir() or (folder / "meta.json").is_file():
            raise UserError(
                f"save_directory: {folder} holds a run or a checkpoint; expected another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as fresh:
            super().save_pretrained(fresh, **card)
            for path in sorted(Path(fresh).iterdir()):
                if not (path.name == "README.md" and (folder / path.name).exists()):
                    os.replace(path, folder / path.name)
        if not push:
            return None
        return self.push_to_hub(repository or folder.resolve().name, **card, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        pretrained.write(save_directory, self.model, self.meta, self.history)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        map_location: str | torch.device = "cpu",
        **download: Any,
    ) -> TextModel:
        """The model of a folder, or of a repository on Hugging Face's hub.

        Args:
            pretrained_model_name_or_path: a folder of :meth:`save_pretrained`, or "owner/name".
            map_location: where the model goes.
            download: ``revision``, ``token`` and the like, as ``snapshot_download`` takes them.

        Raises:
            UserError: the files are damaged, or not of a model of ours.
            ImportError: huggingface_hub is needed and missing.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        if not Path(folder).is_dir():
            require("from_pretrained")
            from huggingface_hub import snapshot_download

            files = [pretrained.CONFIG, pretrained.WEIGHTS, pretrained.HISTORY]
            folder = cast(str, snapshot_download(folder, allow_patterns=files, **download))
        return cls.load(folder, device=map_location)

    def _known(self, text: str | bytes, least: int) -> Tensor:
        """int64 ``(T, 1)`` on the model's device."""
        indices, unknown = self.alphabet.encode(_encoded("text", text))
        if len(indices) < least:
            each = UNITS[self.alphabet.unit].each
            raise UserError(
                f"text must hold {least} or more {each}s that the model knows, "
                f"it holds {len(indices)}"
            )
        self._warn_of("text", unknown)
        return indices.to(self.device)

    def _warn_of(self, argument: str, unknown: int) -> None:
        if unknown:
            warnings.warn(
                f"{argument}: {note_of_unknown(unknown, self.alphabet.unit)}", stacklevel=3
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)


def _encoded(argument: str, text: str | bytes) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8", errors="surrogateescape")
    if isinstance(text, bytes):
        return text
    raise TypeError(f"{argument} must be a str or bytes, got {type(text).__name__}")
