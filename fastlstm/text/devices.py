"""The device that a model runs on."""

from __future__ import annotations

import torch

from . import UserError


def pick_device(
    name: str, precision: str = "fp32", local: int = 0, argument: str = "--device"
) -> torch.device:
    """The device of that name; of several GPUs, a team's each take their own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # a device may be named and still not be there
    except Exception as error:  # torch raises many kinds here
        raise UserError(f"{argument}: {name} is not available here") from error
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        raise UserError(f"--precision {precision} needs a GPU; a CPU has fp32 and bf16")
    return device
