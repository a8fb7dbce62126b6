"""Which algorithm runs a problem: what the planner picks and why, and how to force another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase

from .modules import stack_of
from .ops.algorithm import algorithm, settings
from .ops.native import _C, DTYPES, gpu_sizes, kernels_missing
from .stack import ALGORITHMS

__all__ = ["ALGORITHMS", "GPUS", "Explanation", "algorithm", "explain"]

# (compute capability, multiprocessors, bytes of shared memory that a block may ask for)
GPUS = {
    "T4": (75, 40, 64 << 10),
    "A100": (80, 108, 163 << 10),
    "RTX 3090": (86, 82, 99 << 10),
    "L40S": (89, 142, 99 << 10),
    "RTX 4090": (89, 128, 99 << 10),
    "H100": (90, 132, 227 << 10),
    "H200": (90, 132, 227 << 10),
    "B200": (100, 148, 227 << 10),
    "RTX 5090": (120, 170, 99 << 10),
}


@dataclass(frozen=True)
class Explanation:
    """What runs a problem's forward and backward pass, and why.

    Attributes:
        device: the module's, or the GPU that was asked about.
        algorithm, backward_algorithm: "fused" (the CPU's kernels), "stepwise", "cluster", "grid",
            or "torch" where there are no kernels and torch's own LSTM runs.
        reason, backward_reason: in words.
        step_microseconds, backward_step_microseconds: on GPUs, the planner's own estimate of a
            time step of all layers, from what was measured on an H200 and, for stepwise, from data
            sheets; else None. What surrounds the steps is not in it.
        ctas, backward_ctas: how many SMs share a group of sequences and hold a layer's weights for
            it; 0 where no weights stay on chip.
        sequences, backward_sequences: of such a group, at the most.
        chunk_steps, backward_chunk_steps: where the layers work at once, each one chunk of steps
            behind the one before, the steps of a chunk; 0 where one layer follows the other.
        layers, steps: of the call.
    """

    device: str
    algorithm: str
    reason: str
    backward_algorithm: str
    backward_reason: str
    step_microseconds: float | None = None
    backward_step_microseconds: float | None = None
    ctas: int = 0
    backward_ctas: int = 0
    sequences: int = 0
    backward_sequences: int = 0
    chunk_steps: int = 0
    backward_chunk_steps: int = 0
    layers: int = 1
    steps: int = 1

    def __str__(self) -> str:
        def part(
            algorithm: str, reason: str, step: float | None, ctas: int, group: int, chunk: int
        ) -> str:
            shape = f", {ctas} SM{'s'[: ctas - 1]} for {group} sequences" if ctas else ""
            if chunk:
                chunks = -(-self.steps // chunk)
                shape += f", {self.layers} layers in {chunks} chunks of {chunk} steps"
            time = f", about {step:.1f} us a step" if step is not None else ""
            return f"{algorithm} ({reason}{shape}{time})"

        forward = part(
            self.algorithm,
            self.reason,
            self.step_microseconds,
            self.ctas,
            self.sequences,
            self.chunk_steps,
        )
        backward = part(
            self.backward_algorithm,
            self.backward_reason,
            self.backward_step_microseconds,
            self.backward_ctas,
            self.backward_sequences,
            self.backward_chunk_steps,
        )
        return f"{self.device}: forward {forward}; backward {backward}"


def explain(
    lstm: RNNBase,
    batch_size: int | None = None,
    seq_length: int | None = None,
    *,
    packed: bool = False,
    gpu: str | None = None,
) -> Explanation:
    """Which algorithm the planner picks for a module and a batch, and why.

    Args:
        lstm: a ``fastlstm.LSTM``, or an ``nn.LSTM`` to be converted; the dtype and the device of
            its weights count.
        batch_size: B of the input; has to be given.
        seq_length: T of the input; has to be given.
        packed: whether the input is a ``PackedSequence``.
        gpu: explain for this GPU (a key of ``fastlstm.algorithms.GPUS``, such as ``"H200"``), which
            need not be there, instead of the weights' device.

    Raises:
        TypeError: a size is missing; lstm is no LSTM.
        ValueError: an unknown gpu, or a size that is not positive; an algorithm was forced that
            cannot run the problem.
    """
    if batch_size is None or seq_length is None:
        raise TypeError(
            "explain: expected the input's batch_size and seq_length, on which the choice depends, "
            "as in explain(lstm, batch_size=32, seq_length=100)"
        )
    for argument, value in (("batch_size", batch_size), ("seq_length", seq_length)):
        if value < 1:
            raise ValueError(f"{argument}: expected a positive number, got {value}")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    if not isinstance(lstm, RNNBase) or lstm.mode != "LSTM":
        raise TypeError(f"lstm: expected a fastlstm.LSTM or an nn.LSTM, got {type(lstm).__name__}")
    weight = cast(Tensor, lstm.weight_hh_l0)  # a parametrization computes it
    if gpu is None and (missing := kernels_missing(weight)):
        return Explanation(str(weight.device), "torch", missing, "torch", missing)
    if gpu is None and weight.device.type != "cuda":
        reason = f"the fused kernels for {_C.cpu_selected()}; every problem"
        return Explanation(str(weight.device), "fused", reason, "fused", reason)
    if gpu is None:
        device = f"{weight.device} ({torch.cuda.get_device_name(weight.device)})"
        capability, sms, shared, cluster = gpu_sizes(weight.device)
    else:
        device, (capability, sms, shared), cluster = gpu, GPUS[gpu], 16
    if weight.dtype not in DTYPES:
        raise ValueError(f"lstm: no kernels for {weight.dtype}")
    allow_tf32, forced = settings()
    stack = stack_of(lstm)
    forward, backward = (
        _C.plan(
            dtype=DTYPES.index(weight.dtype),
            steps=seq_length,
            batch=batch_size,
            packed=packed,
            hidden_size=stack.hidden_size,
            proj_size=stack.proj_size,
            layers=stack.num_layers,
            directions=stack.directions,
            backward=in_backward,
            capability=capability,
            sms=sms,
            shared_per_block=shared,
            algorithm=forced,
            allow_tf32=allow_tf32,
            plain_cells=not stack.has_rules,
            layer_norm=stack.layer_norm,
            largest_cluster=cluster,
        )
        for in_backward in (False, True)
    )
    return Explanation(
        device,
        forward["algorithm"],
        forward["reason"],
        backward["algorithm"],
        backward["reason"],
        forward["microseconds"],
        backward["microseconds"],
        ctas=forward.get("ctas", 0),
        backward_ctas=backward.get("ctas", 0),
        sequences=forward.get("sequences", 0),
        backward_sequences=backward.get("sequences", 0),
        chunk_steps=forward.get("chunk_steps", 0),
        backward_chunk_steps=backward.get("chunk_steps", 0),
        layers=stack.num_layers,
        steps=seq_length,
    )
