"""What figures are measured on, what it does at best, and the memory that a call needs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import fastlstm
from fastlstm import _C
from fastlstm.machine import processor

from .timing import wall

# The highest rates that this process has seen: FLOP/s of multiply-adds, bytes/s of a copy.
CEILINGS: dict[str, float] = {}


def described(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {_C.cpu_selected()}, {torch.get_num_threads()} threads"


# ---- ceilings ----


def ceiling(kind: str) -> str:
    """The name in CEILINGS of what bounds the products of a type on the CPU.

    Where the instruction set has no products of bfloat16, it is widened and multiplied as fp32.
    """
    products = any(name in _C.cpu_selected() for name in ("bf16", "amx"))
    return "multiply_adds_bf16" if kind == "bf16" and products else "multiply_adds"


def multiply_add_rate(multiply_adds: Callable[[int], float], seconds: float = 0.01) -> float:
    """FLOP/s of all threads at once, from registers; each of three readings takes ``seconds``."""
    threads = torch.get_num_threads()
    rounds = 1000
    while _seconds(multiply_adds, rounds) < seconds:
        rounds *= 2
    with ThreadPoolExecutor(threads) as pool:
        done = 0.0

        def run() -> None:
            nonlocal done
            done = sum(pool.map(multiply_adds, [rounds] * threads))

        return max(done / wall(run, 1) for _ in range(3))


def _seconds(call: Callable[[int], object], argument: int) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


def copy_rate() -> float:
    """Bytes/s that torch reads and writes when it copies what no cache holds."""
    a = torch.ones(1 << 26)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(wall(lambda: b.copy_(a), 1) for _ in range(3))


def measure_ceilings() -> None:
    """Measure the CPU's again: on a shared host one moment's rate may be half of another's."""
    rates = {"multiply_adds": multiply_add_rate(_C.cpu_multiply_adds), "copy": copy_rate()}
    bf16: Any = getattr(_C, "cpu_multiply_adds_bf16", None)
    if bf16 is not None and ceiling("bf16") == "multiply_adds_bf16":
        rates["multiply_adds_bf16"] = multiply_add_rate(bf16)
    for name, rate in rates.items():
        CEILINGS[name] = max(CEILINGS.get(name, 0.0), rate)


# ---- memory ----


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes by which one more call raises what is held; None where the system does not tell.

    On a CPU: of the process's resident pages, after malloc and fastlstm gave back those that they
    kept. What another library holds from call to call is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        fastlstm.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
        before = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError, StopIteration):
        return None


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])
