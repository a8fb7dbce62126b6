"""The compiled modules: what was built, where kernels run, and how an operator is called."""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..stack import Stack

try:
    import fastlstm._C as _C  # `from .. import` would report a circular import where it is missing
except ImportError as error:
    raise ImportError(
        "fastlstm's native module is missing or cannot be loaded "
        f"({error}); build it with `pip install .` in the source folder"
    ) from error

__all__ = [
    "DTYPES",
    "Scalars",
    "call",
    "constant_in_compiled",
    "cuda_architectures",
    "empty_cache",
    "from_scalars",
    "gpu_sizes",
    "has_cuda",
    "kernels_missing",
    "missing_on_gpu",
    "scalars_of",
]

T = TypeVar("T")
Scalars = tuple[Any, ...]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # csrc/lstm.h's order

if (_asked := os.environ.get("FASTLSTM_CPU_ISA")) and _asked != _C.cpu_selected():
    raise ImportError(
        f"FASTLSTM_CPU_ISA={_asked!r}: expected one of {', '.join(_C.cpu_supported())} "
        "on this processor"
    )


def empty_cache() -> None:
    """Give back to the system the CPU memory that the kernels keep for their next call.

    Kept are the workspaces of this thread's calls, and what training steps need again: at most
    64 MiB by a thread and 1 GiB by the process. Tensors that are in use are not touched. For
    memory on a GPU, ``torch.cuda.empty_cache``.
    """
    _C.free_kept()


# Importing it registers the operators for CUDA. With a torch that has no CUDA it cannot be loaded,
# and is not needed.
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
    PTX on everything newer; that of ``10.0a+PTX`` is of 10.0.
    """
    for name in re.split(r"[;,\s]+", architectures):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if match[4] and capability >= built:
            return True
        if match[3] == "a":
            if capability == built:
                return True
        elif capability >= built and capability[0] == built[0]:
            return True
    return False


def constant_in_compiled(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compiler.assume_constant_result, but without importing Dynamo, which takes seconds.

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


def gpu_sizes(device: torch.device) -> tuple[int, int, int, int]:
    """What the planner reads of a GPU on which the kernels run.

    Returns:
        ``(capability, multiprocessors, shared, cluster)``: the compute capability as ``90``, or
        that for which the kernels were compiled where the driver made code for this GPU of older
        PTX; the bytes of shared memory that a block may ask for; the blocks of the largest cluster.
    """
    with torch.cuda.device(device):
        sizes: tuple[int, int, int, int] = _C_cuda.gpu_sizes()
    return sizes


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
        if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return operator(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # past its rule, which is written in Python
            return operator(*arguments)
    except RuntimeError as error:
        text = str(error)
        refused = _NOT_ALLOCATED.search(text)
        if refused is None and "CUDA out of memory" not in text:
            raise
    if refused is not None:
        # The stable ABI passes on no exception's type, and its text only since torch 2.13. The same
        # allocation, tried again here, makes torch raise its own exception, unless the memory that
        # the failed call has freed is now enough.
        torch.empty(int(refused[1]), dtype=torch.uint8, device=refused[2])
        text = refused[3]
    raise (torch.OutOfMemoryError if "CUDA out of memory" in text else RuntimeError)(text)


# csrc/stable.h writes it.
_NOT_ALLOCATED = re.compile(r"fastlstm: cannot allocate (\d+) bytes on (cpu|cuda:\d+): (.*)", re.S)


def scalars_of(stack: Stack, dropout: float, settings: tuple[bool, int] = (False, 0)) -> Scalars:
    """The forward and backward operators' plain arguments, in the order of their schemas.

    Args:
        settings: as of ``algorithm.settings``; they matter on CUDA alone.
    """
    # A number that Dynamo meets inside an autograd.Function first is unknown to it in the next one.
    rules = [float(x) for x in stack[6:10]]
    return (*stack[1:6], float(dropout), *rules, stack.layer_norm, *settings)


def from_scalars(scalars: Scalars, input_size: int) -> tuple[Stack, float]:
    """The stack and the dropout that :func:`scalars_of` made them of."""
    return Stack(input_size, *scalars[:5], *scalars[6:11]), scalars[5]
