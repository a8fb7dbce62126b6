"""Differentially private training (DP-SGD): per-sample gradients through ``torch.func``.

Every sample's gradient is clipped before the batch's is summed, and noise hides each of them (Abadi
and others, "Deep Learning with Differential Privacy", 2016). Run it: ``python examples/dp_sgd.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastlstm


class Classifier(nn.Module):
    """A sequence ``(T, B, 8)`` to logits ``(B, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastlstm.LSTM(8, 16)
        self.output = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x)[0][-1])


def sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of every sample of ``x`` ``(T, B, 8)``: ``(B, ...)`` by the parameter's name."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, x[:, None]), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 1, 0))(parameters, x, y)


def private_gradient(gradients: dict[str, Tensor], clip: float, noise: float) -> dict[str, Tensor]:
    """The batch's mean of gradients no longer than ``clip``, with normal noise times it."""
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
    lengths = torch.stack(squares).sum(0).sqrt()
    weights = (clip / lengths).clamp(max=1.0)  # (B,)
    return {
        name: (torch.tensordot(weights, gradient, 1) + noise * clip * torch.randn_like(gradient[0]))
        / len(weights)
        for name, gradient in gradients.items()
    }


def main(steps: int = 60, clip: float = 1.0, noise: float = 0.3) -> tuple[float, float]:
    """Learn whether a sequence's first feature has a positive mean; the loss before and after."""
    torch.manual_seed(0)
    model, losses = Classifier(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x = torch.randn(12, 64, 8)
        y = (x[:, :, 0].mean(0) > 0).long()
        losses.append(F.cross_entropy(model(x), y).item())
        gradient = private_gradient(sample_gradients(model, x, y), clip, noise)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name]
        optimizer.step()
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} private steps")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
