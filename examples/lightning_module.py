"""fastlstm in a LightningModule: sequences of different lengths, padded and not packed.

Needs ``pip install lightning``. Run it: ``python examples/lightning_module.py``.
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastlstm


class SumSign(lightning.LightningModule):
    """Says of a padded sequence whether its numbers add up to more than nothing."""

    def __init__(self, hidden_size: int = 32, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lstm = fastlstm.LSTM(1, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """``(B, T, 1)`` and ``(B,)`` to logits ``(B, 2)``."""
        _, (h_n, _) = self.lstm(x, lengths=lengths)  # of each sequence's last step
        return self.output(h_n[-1])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        x, lengths, y = batch
        loss = F.cross_entropy(self(x, lengths), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> None:
        x, lengths, y = batch
        self.log("accuracy", (self(x, lengths).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def sequences(count: int, longest: int = 20) -> TensorDataset:
    """Numbers ``(count, longest, 1)``, nothing beyond each length, and the sign of their sum."""
    x, lengths = torch.randn(count, longest, 1), torch.randint(1, longest + 1, (count,))
    x[torch.arange(longest) >= lengths[:, None]] = 0
    return TensorDataset(x, lengths, (x.sum((1, 2)) > 0).long())


def main(count: int = 2048, epochs: int = 3, folder: str | None = None) -> float:
    """Train, and return the accuracy on sequences that it has not seen."""
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    training, validation = DataLoader(sequences(count), 64, shuffle=True), sequences(512)
    trainer.fit(SumSign(), training, DataLoader(validation, 512))
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"{accuracy:.1%} right")
    return accuracy


if __name__ == "__main__":
    main()
