"""fastlstm in Hugging Face's Trainer: a language model that it trains, saves and loads.

Needs ``pip install transformers accelerate``. Run it: ``python examples/huggingface_trainer.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

import fastlstm

LENGTH = 64


class CharLSTMConfig(PretrainedConfig):
    """Sizes of the model."""

    model_type = "char-lstm"

    def __init__(self, vocab_size: int = 256, hidden_size: int = 64, **options) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**options)


class CharLSTM(PreTrainedModel):
    """Bytes ``(B, T)`` to logits ``(B, T, V)``, and the loss where labels are there too."""

    config_class = CharLSTMConfig

    def __init__(self, config: CharLSTMConfig) -> None:
        super().__init__(config)
        # Integer input stands for one-hot vectors, which are never built.
        self.lstm = fastlstm.LSTM(config.vocab_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        logits = self.output(self.lstm(input_ids)[0])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def windows(text: bytes) -> list[dict[str, Tensor]]:
    """The text in pieces of 64 bytes, each its own target."""
    pieces = torch.tensor(list(text)).unfold(0, LENGTH, LENGTH // 2)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(text: bytes | None = None, steps: int = 300, folder: str | None = None) -> list[float]:
    """Train on a text, by default this file, save the model; the loss at the start and the end."""
    text = text or Path(__file__).read_bytes()
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or temporary
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(CharLSTM(CharLSTMConfig()), arguments, train_dataset=windows(text))
        trainer.train()
        trainer.save_model(folder)
        CharLSTM.from_pretrained(folder)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at step {steps}")
    return [losses[0], losses[-1]]


if __name__ == "__main__":
    main()
