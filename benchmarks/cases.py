"""The problems that are timed, and how much arithmetic each is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm


@dataclass(frozen=True)
class Case:
    """An LSTM stack and a batch: I, H, L, B and T in the names' order."""

    name: str
    input_size: int
    hidden_size: int
    num_layers: int
    batch: int
    steps: int
    bidirectional: bool = False
    dropout: float = 0.0

    def sizes(self) -> str:
        """I, H x L, B and T, as ``65-512x2, B100 T100``."""
        layers = f"x{self.num_layers}" if self.num_layers > 1 else ""
        both = " both directions" if self.bidirectional else ""
        stack = f"{self.input_size}-{self.hidden_size}{layers}{both}"
        return f"{stack}, B{self.batch} T{self.steps}"

    def flops(self, training: bool) -> float:
        """Of the matrix products alone; a training step counts three times the forward pass."""
        directions = 1 + self.bidirectional
        widths = [self.input_size, *[directions * self.hidden_size] * (self.num_layers - 1)]
        products = sum(8 * self.hidden_size * (width + self.hidden_size) for width in widths)
        return float(products * directions * self.steps * self.batch * (3 if training else 1))

    def bytes(self, size: int) -> float:
        """Of weights, input and output, in elements of ``size`` bytes: what must move once."""
        directions = 1 + self.bidirectional
        widths = [self.input_size, *[directions * self.hidden_size] * (self.num_layers - 1)]
        weights = sum(4 * self.hidden_size * (width + self.hidden_size + 2) for width in widths)
        rows = self.steps * self.batch * (self.input_size + directions * self.hidden_size)
        return float(size * (weights * directions + rows))

    def tiny(self) -> Case:
        """The same kind of problem, small enough to cost nothing."""
        return replace(
            self, input_size=min(self.input_size, 8), hidden_size=min(self.hidden_size, 12),
            batch=min(self.batch, 3), steps=min(self.steps, 5),
        )  # fmt: skip

    def twins(self, dtype: torch.dtype, device: str) -> tuple[nn.LSTM, fastlstm.LSTM]:
        """torch's module and ours with the same weights."""
        sizes = (self.input_size, self.hidden_size, self.num_layers)
        options: Any = {"bidirectional": self.bidirectional, "dropout": self.dropout}
        theirs = nn.LSTM(*sizes, **options, device=device, dtype=dtype)
        ours = fastlstm.LSTM(*sizes, **options, device=device, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    def data(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """A random input, and a random gradient of the output."""
        width = (1 + self.bidirectional) * self.hidden_size
        return (
            torch.randn(self.steps, self.batch, self.input_size, device=device, dtype=dtype),
            torch.randn(self.steps, self.batch, width, device=device, dtype=dtype),
        )


KARPATHY = Case("Karpathy's batch", 65, 512, 2, 100, 100)

BASE = Case("H256", 256, 256, 1, 32, 50)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

GPU_CASES = [
    KARPATHY,
    Case("Karpathy's batch, dropout", 65, 512, 2, 100, 100, dropout=0.5),
    Case("long, H1024", 1024, 1024, 1, 64, 512),
    Case("H2048", 2048, 2048, 1, 128, 256),
    Case("long, H256", 256, 256, 1, 16, 1024),
    Case("long, H768", 768, 768, 1, 16, 1024),
    Case("small", 65, 128, 2, 50, 50),
    Case("batch 1", 256, 256, 1, 1, 100),
    Case("speech, both directions", 80, 512, 3, 32, 200, bidirectional=True),
    Case("three layers", 512, 512, 3, 32, 100),
    Case("wide batch", 40, 64, 2, 128, 200),
    Case("H384", 100, 384, 2, 20, 150),
    Case("H4096", 1024, 4096, 1, 32, 64),
    Case("one step, 2x512", 512, 512, 2, 1, 1),
]

# Of the design's table, and the sizes around it.
CPU_CASES = [
    KARPATHY,
    Case("small", 65, 128, 2, 50, 50),
    Case("sentences", 128, 128, 1, 16, 113),
    Case("batch 1", 256, 256, 1, 1, 100),
    Case("tiny, batch 1", 64, 64, 1, 1, 50),
    Case("tiny, batch 8", 32, 32, 1, 8, 100),
    Case("H512", 512, 512, 1, 32, 100),
    Case("H1024", 1024, 1024, 1, 64, 50),
    Case("wide batch", 40, 64, 2, 128, 200),
    Case("both directions", 80, 256, 2, 16, 60, bidirectional=True),
    Case("three layers, batch 4", 128, 384, 3, 4, 60),
    Case("one step, 2x512", 512, 512, 2, 1, 1),
    Case("one step, batch 8", 256, 256, 1, 8, 1),
]
