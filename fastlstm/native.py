"""The compiled modules: what was built, where its kernels run, and what its operators are given."""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "fastlstm's native module is missing or cannot be loaded "
        f"({error}); build it with `pip install .` in the source folder"
    ) from error

__all__ = [
    "DTYPES",
    "Options",
    "call",
    "constant_in_compiled",
    "cuda_architectures",
    "has_cuda",
    "kernels_missing",
    "missing_on_gpu",
]

T = TypeVar("T")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # csrc/lstm.h's order

if (_asked := os.environ.get("FASTLSTM_CPU_ISA")) and _asked != _C.cpu_selected():
    raise ImportError(
        f"FASTLSTM_CPU_ISA={_asked!r}: expected one of {', '.join(_C.cpu_supported())} "
        "on this processor"
    )


# Registers the operators' CUDA side. Beside a torch without CUDA a module that was built for one
# cannot be loaded, and nobody misses it.
_C_cuda: Any = None
if torch.version.cuda is not None:
    try:
        _C_cuda = importlib.import_module("fastlstm._C_cuda")
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        warnings.warn(f"fastlstm's CUDA kernels cannot be loaded: {error}", stacklevel=2)


def has_cuda() -> bool:
    """Whether the CUDA kernels were built and can be loaded."""
    return _C_cuda is not None


def cuda_architectures() -> str | None:
    """What the CUDA kernels were built for, as TORCH_CUDA_ARCH_LIST names it; None without any."""
    return None if _C_cuda is None else _C_cuda.architectures


def _runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether kernels built for these (as TORCH_CUDA_ARCH_LIST names them) run on such a GPU.

    An image runs on its own major version from its minor version on, one of ``9.0a`` on 9.0 alone,
    PTX on everything newer.
    """
    for name in re.split(r"[;,\s]+", architectures):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            continue
        built = (int(found[1]), int(found[2]))
        if found[3] == "a":
            if capability == built:
                return True
        elif capability >= built and (capability[0] == built[0] or (found[4] and not found[3])):
            return True
    return False


def constant_in_compiled(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compiler.assume_constant_result, without importing all of Dynamo (two seconds) for it.

    A compiled call keeps what was in force at its tracing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _missing_on_gpu(device: int) -> str | None:
    built = cuda_architectures()
    if built is None:
        return "the CUDA kernels were not built"
    capability = torch.cuda.get_device_capability(device)
    if _runs_on(capability, built):
        return None
    return (
        f"the CUDA kernels were built for {built}, "
        f"not for a GPU of compute capability {capability[0]}.{capability[1]}"
    )


@constant_in_compiled
def missing_on_gpu(device: int) -> str | None:
    """Why the CUDA kernels cannot run on the GPU of this number; None where they can."""
    return _missing_on_gpu(device)


def kernels_missing(like: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like this one; None where they can."""
    kind = like.device.type
    if like.dtype not in DTYPES:
        return f"there are no kernels for {like.dtype}"
    if kind in ("cpu", "meta"):
        return None
    if kind == "cuda":
        return missing_on_gpu(like.device.index)
    return f"there are no kernels for device type {kind!r}"


def call(operator: Callable[..., T], *arguments: Any) -> T:
    """One of the native operators' results, with torch's own exception where memory runs out.

    Raises:
        torch.OutOfMemoryError: a GPU's memory does not suffice.
        RuntimeError: the CPU's does not, in the words of torch's allocator; whatever else the
            operator raises.
    """
    if torch.compiler.is_compiling():  # the graph holds the operator alone
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        text = str(error)
        refused = _NOT_ALLOCATED.search(text)
        if refused is None and "CUDA out of memory" not in text:
            raise
    if refused is not None:
        # The stable ABI hands out no exception's type, and its text since torch 2.13 alone. Asking
        # again makes torch raise its own, unless what the call had held until then now suffices.
        torch.empty(int(refused[1]), dtype=torch.uint8, device=refused[2])
        text = refused[3]
    raise (torch.OutOfMemoryError if "CUDA out of memory" in text else RuntimeError)(text)


# csrc/stable.h writes it.
_NOT_ALLOCATED = re.compile(r"fastlstm: cannot allocate (\d+) bytes on (cpu|cuda:\d+): (.*)", re.S)


class Options(NamedTuple):
    """The operators' plain arguments, in the order of their schemas."""

    hidden_size: int
    num_layers: int = 1
    has_bias: bool = True
    proj_size: int = 0
    bidirectional: bool = False
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    cell_clip: float = 0.0
    layer_norm: bool = False
    allow_tf32: bool = False  # float32 on CUDA: steps on the tensor cores
    algorithm: int = 0  # on CUDA: place in algorithms.ALGORITHMS

    @property
    def out_size(self) -> int:
        """P: elements of h."""
        return self.proj_size or self.hidden_size

    @property
    def directions(self) -> int:
        """D: 2 where a second one reads the sequence backwards."""
        return 2 if self.bidirectional else 1
