"""What a training call runs on the GPU, by torch's profiler: launches, kernels, their times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ..accuracy import precision
from ..backends import prepared
from ..cases import Case

CALLS = 2  # under the profiler, after two that warm up
TOP = 8
NAME = 120  # characters of a kernel's name that are kept


def profile(case: dict[str, Any], kind: str, device: str) -> dict[str, Any]:
    """A row for ours and for nn.LSTM's training call: its launches, and its longest kernels."""
    with precision(kind):
        ready = prepared(Case(**case), kind, True, device, ("fastlstm", "torch"))
        what = {"case": case["name"], "sizes": Case(**case).sizes(), "precision": kind}
        rows = [
            what | {"backend": name} | profiled(call, device) for name, call in ready.calls.items()
        ]
    return {"rows": rows}


def profiled(call: Callable[[], object], device: str) -> dict[str, Any]:
    """On a CPU operators stand for kernels, each with its own time alone."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(2):
        call()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(CALLS):
            call()
        if cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in profiler.key_averages():
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu == cuda:
            time = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels.append((time / CALLS, event.count / CALLS, event.key[:NAME]))
    kernels.sort(reverse=True)
    return {
        "milliseconds": sum(time for time, _, _ in kernels) / 1e3,
        "launches": sum(count for _, count, _ in kernels),
        "kernels": [
            {"microseconds": time, "calls": count, "name": name}
            for time, count, name in kernels[:TOP]
        ],
    }
