"""FlashRNN and haste as stacks of layers with an ``nn.LSTM``'s weights, where they are installed.

Both run on CUDA alone, a layer in one direction a call. Each stack returns as nn.LSTM does, without
the states.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def layers_of(lstm: nn.LSTM) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    found: Any = [
        tuple(lstm.get_parameter(f"{name}_l{layer}").detach().clone() for name in names)
        for layer in range(lstm.num_layers)
    ]
    return found


class HasteStack(nn.Module):
    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        import haste_pytorch

        self.layers = nn.ModuleList()
        for weights in layers_of(lstm):
            layer = haste_pytorch.LSTM(weights[0].shape[1], lstm.hidden_size)
            layer.from_native_weights(*weights)
            self.layers.append(layer.to(weights[0].device))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for layer in self.layers:
            x = layer(x)[0]
        return x, None


class FlashRNNStack(nn.Module):
    """FlashRNN takes the projected input (B, T, gates, heads, width); the projection is ours."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        from flashrnn import flashrnn

        self.run = flashrnn
        self.dtype = str(lstm.weight_ih_l0.dtype).removeprefix("torch.")
        self.projections, self.recurrent = nn.ParameterList(), nn.ParameterList()
        self.biases = nn.ParameterList()
        for weight_ih, weight_hh, bias_ih, bias_hh in layers_of(lstm):
            units = lstm.hidden_size
            self.projections.append(weight_ih)
            self.recurrent.append(weight_hh.view(4, 1, units, units))
            self.biases.append((bias_ih + bias_hh).view(4, 1, units))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for weight_ih, r, b in zip(self.projections, self.recurrent, self.biases, strict=True):
            projected = F.linear(x, weight_ih).unflatten(2, (4, 1, -1)).transpose(0, 1)
            states, _ = self.run(
                projected, r, b, function="lstm", backend="cuda_fused", dtype=self.dtype
            )
            x = states[0].squeeze(2).transpose(0, 1)  # of (states, B, T, heads, width)
        return x, None
