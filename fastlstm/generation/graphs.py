"""A step of drawing text as a CUDA graph: one launch a token in place of dozens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["as_graph"]


def as_graph(function: Callable[[], None], buffers: Sequence[Tensor]) -> Callable[[], None]:
    """Capture a function of no arguments on the current CUDA device.

    Args:
        function: reads and writes memory that outlives it, and waits for nothing.
        buffers: what it changes and reads again. They are as they were when this returns.

    Returns:
        A call that launches what the function does.
    """
    with torch.cuda.device(buffers[0].device):
        return _captured(function, buffers)


def _captured(function: Callable[[], None], buffers: Sequence[Tensor]) -> Callable[[], None]:
    before = [x.clone() for x in buffers]
    # Once outside of the graph, on another stream as torch.cuda.graph asks: libraries make their
    # workspaces at their first call.
    current, warm_up = torch.cuda.current_stream(), torch.cuda.Stream()
    warm_up.wait_stream(current)
    with torch.cuda.stream(warm_up):
        function()
    current.wait_stream(warm_up)
    for x, y in zip(buffers, before, strict=True):
        x.copy_(y)
    graph = torch.cuda.CUDAGraph()
    # torch's default is one stream for the whole process, on the device that first needed it: work
    # of another device would run at once, and the graph be empty.
    with torch.cuda.graph(graph, stream=warm_up):
        function()
    return graph.replay
