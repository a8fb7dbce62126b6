"""Settings of a call on CUDA: the forced algorithm, and whether float32 may use tf32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..stack import ALGORITHMS
from .native import constant_in_compiled

__all__ = ["algorithm", "settings"]


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
        name: ``"auto"`` (the planner's choice), ``"stepwise"``, ``"cluster"`` or ``"grid"``.

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
    precision = getattr(rnn, "fp32_precision", None)  # once it is set, reading allow_tf32 raises
    if precision in ("tf32", "ieee"):
        return precision == "tf32"
    return bool(torch.backends.cudnn.allow_tf32)


settings = constant_in_compiled(_settings)
