"""What ``--precision auto`` stands for."""

from __future__ import annotations

import torch

from ...ops import native

BF16_SETS = ("avx512_bf16", "amx")  # instruction sets of the kernels that multiply bfloat16


def choose(cell: str, device: torch.device) -> str:
    """The precision that is fast here and learns as float32 does (benchmarks/NOTES.md).

    torch's own cells stay near float32, for they are there to compare with: autocast runs cuDNN's
    recurrent layers in float16 whatever it was asked for, without a place for its scaled loss, and
    on a CPU their bfloat16 is slow or far from float32. On a GPU they take tf32, as torch lets
    cuDNN do by itself; a GPU without tf32 computes in float32 then. So does ``lstm`` on a GPU that
    our kernels were not built for, where torch's own LSTM runs.

    Args:
        cell: one of ``model.CELLS``.
        device: where the run trains.
    """
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        modern = torch.cuda.get_device_capability(number) >= (8, 0)
        ours = cell == "lstm" and native.missing_on_gpu(number) is None
        return "bf16" if ours and modern else "tf32"
    fast = device.type == "cpu" and native._C.cpu_selected() in BF16_SETS
    return "bf16" if cell == "lstm" and fast else "fp32"
