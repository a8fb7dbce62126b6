"""The model of a run, what is called in its place while it trains, and its optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import UserError, cli
from ..model import CharModel, predict_frequencies
from .options import Config
from .team import Team

OBJECTS = 2048  # bytes that Python's objects of a layer take, and more


def make_model(
    config: Config, meta: dict[str, Any], counts: Tensor, device: torch.device
) -> CharModel:
    """A model that begins with how often characters occur.

    Args:
        meta: of its checkpoints.
        counts: int64 ``(V,)``, how often each character occurs.

    Raises:
        UserError: memory cannot hold it.
    """
    torch.manual_seed(config.seed)
    gates = {"gru": 3, "rnn": 1}.get(config.cell, 4)
    least = config.num_layers * (OBJECTS + 4 * gates * config.hidden_size**2)  # W_hh alone
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if least > most:  # torch would take page after page until the system kills somebody
        raise UserError(
            f"the model does not fit: --num-layers {config.num_layers} of --hidden-size "
            f"{config.hidden_size} take at least {least / 1e9:.3g} GB, this machine has "
            f"{most / 1e9:.3g}"
        )
    try:
        model = CharModel(len(meta["vocabulary"]), **meta["model"]).to(device)
    except (RuntimeError, TypeError) as error:  # whatever torch says of sizes beyond memory
        raise UserError(f"the model does not fit: {cli.first_line(error)}") from error
    predict_frequencies(model, counts)
    return model


def spread(model: CharModel, config: Config, team: Team) -> Callable[..., Any]:
    """What to call in training: the model, compiled and with its gradients averaged if so asked."""
    forward: Any = model
    if config.compile:
        forward = torch.compile(forward)
    if team.size > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward)
    return forward


def make_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the config names."""
    decay: dict[str, Any] = {}
    if config.weight_decay is not None:
        decay["weight_decay"] = config.weight_decay
    if config.optimizer == "rmsprop":  # char-rnn's decay
        return torch.optim.RMSprop(model.parameters(), lr=config.lr, alpha=0.95, **decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=config.lr, fused=True, **decay)


def is_compilers(error: BaseException) -> bool:
    """Whether torch.compile raised it."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
