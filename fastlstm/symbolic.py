"""``torch.fx``: a module of ours is one node of a graph, as torch's own modules are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "symbolic_call"]


def symbolic_call(module: nn.Module, input: Proxy, hx: Any, **options: Any) -> Proxy:
    """The node that calls the module. Options that are off are left out.

    torch.fx enters every module whose class lies outside ``torch.nn``, and there meets control flow
    that depends on the input.
    """
    tracer: Any = input.tracer
    arguments = (input,) if hx is None else (input, hx)
    used = {name: x for name, x in options.items() if x is not None and x is not False}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, used)
