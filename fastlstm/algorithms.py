"""Which algorithm runs a problem: what the planner picks and why, and how to force another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .native import _C, DTYPES, constant_in_compiled, kernels_missing

if TYPE_CHECKING:
    from .modules import LSTM

__all__ = ["ALGORITHMS", "GPUS", "Explanation", "algorithm", "explain"]

ALGORITHMS = ("auto", "stepwise", "persistent", "cluster")  # csrc/cuda/planner.h's order

# (compute capability, multiprocessors, bytes of shared memory that a block may ask for)
GPUS = {
    "T4": (75, 40, 64 << 10),
    "A100": (80, 108, 163 << 10),
    "H100": (90, 132, 227 << 10),
    "H200": (90, 132, 227 << 10),
    "B200": (100, 148, 227 << 10),
}


def _checked(name: str, source: str) -> str:
    if name not in ALGORITHMS:
        raise ValueError(f"{source}: expected one of {', '.join(ALGORITHMS)}, got {name!r}")
    return name


_default = _checked(os.environ.get("FASTLSTM_ALGO") or "auto", "FASTLSTM_ALGO")
_forced: ContextVar[str] = ContextVar("algorithm", default=_default)


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Force an algorithm on CUDA for the calls inside (and for their backward passes).

    The CPU has one algorithm and ignores this. The environment variable ``FASTLSTM_ALGO`` sets the
    default of the whole process.

    Args:
        name: ``"auto"`` (the planner's choice), ``"stepwise"`` or ``"persistent"``.

    Raises:
        ValueError: an unknown name. A call that the algorithm cannot run raises RuntimeError.
    """
    token = _forced.set(_checked(name, "algorithm"))
    try:
        yield
    finally:
        _forced.reset(token)


def _settings() -> tuple[bool, int]:
    """Whether float32 may use tf32 in an RNN (as cuDNN's would), and the algorithm asked for."""
    return _allow_tf32(), ALGORITHMS.index(_forced.get())


def _allow_tf32() -> bool:
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(rnn, "fp32_precision", None)  # reading allow_tf32 raises once this is set
    if precision in ("tf32", "ieee"):
        return precision == "tf32"
    return bool(torch.backends.cudnn.allow_tf32)


settings = constant_in_compiled(_settings)


@dataclass(frozen=True)
class Explanation:
    """What runs a problem's forward and backward pass, and why.

    Attributes:
        device: the module's, or the GPU that was asked about.
        algorithm, backward_algorithm: "fused" (the CPU's kernels), "stepwise", "persistent", or
            "torch" where there are no kernels and torch's own LSTM runs.
        reason, backward_reason: in words.
        step_microseconds, backward_step_microseconds: on GPUs, the planner's own estimate of a
            time step of all layers, from data sheets; else None. Good for comparing shapes and
            algorithms: on an H200 steps took 1.7 to 6.4 times as long.
        layers_at_once, backward_layers_at_once: how many a launch runs, as a wavefront.
    """

    device: str
    algorithm: str
    reason: str
    backward_algorithm: str
    backward_reason: str
    step_microseconds: float | None = None
    backward_step_microseconds: float | None = None
    layers_at_once: int = 1
    backward_layers_at_once: int = 1

    def __str__(self) -> str:
        def part(algorithm: str, reason: str, step: float | None, layers: int) -> str:
            wave = f", {layers} layers at once" if layers > 1 else ""
            time = f", about {step:.1f} us a step" if step is not None else ""
            return f"{algorithm} ({reason}{wave}{time})"

        forward = part(self.algorithm, self.reason, self.step_microseconds, self.layers_at_once)
        backward = part(
            self.backward_algorithm,
            self.backward_reason,
            self.backward_step_microseconds,
            self.backward_layers_at_once,
        )
        return f"{self.device}: forward {forward}; backward {backward}"


def explain(
    lstm: LSTM,
    batch_size: int | None = None,
    seq_length: int | None = None,
    *,
    packed: bool = False,
    gpu: str | None = None,
) -> Explanation:
    """Which algorithm the planner picks for a module and a batch, and why.

    Args:
        lstm: a ``fastlstm.LSTM``; the dtype and the device of its weights count.
        batch_size: B of the input; has to be given.
        seq_length: T of the input; has to be given.
        packed: whether the input is a ``PackedSequence``.
        gpu: explain for this GPU (a key of ``fastlstm.algorithms.GPUS``, such as ``"H200"``), which
            need not be there, instead of the weights' device.

    Raises:
        TypeError: a size is missing.
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
    weight = lstm.get_parameter("weight_hh_l0")
    if gpu is None and (missing := kernels_missing(weight)):
        return Explanation(str(weight.device), "torch", missing, "torch", missing)
    if gpu is None and weight.device.type != "cuda":
        reason = f"the fused kernels for {_C.cpu_selected()}; every problem"
        return Explanation(str(weight.device), "fused", reason, "fused", reason)
    if gpu is None:
        p: Any = torch.cuda.get_device_properties(weight.device)
        device = f"{weight.device} ({p.name})"
        capability, sms = 10 * p.major + p.minor, p.multi_processor_count
        shared = p.shared_memory_per_block_optin
    else:
        device, (capability, sms, shared) = gpu, GPUS[gpu]
    if weight.dtype not in DTYPES:
        raise ValueError(f"lstm: no kernels for {weight.dtype}")
    allow_tf32, forced = _settings()
    forward, backward = (
        _C.plan(
            dtype=DTYPES.index(weight.dtype),
            steps=seq_length,
            batch=batch_size,
            packed=packed,
            hidden_size=lstm.hidden_size,
            proj_size=lstm.proj_size,
            layers=lstm.num_layers,
            directions=1 + lstm.bidirectional,
            backward=in_backward,
            capability=capability,
            sms=sms,
            shared_per_block=shared,
            algorithm=forced,
            allow_tf32=allow_tf32,
            plain_cells=lstm._cell_rules() is None,
            layer_norm=lstm._sizes().layer_norm,
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
        forward.get("wave", 1),
        backward.get("wave", 1),
    )
