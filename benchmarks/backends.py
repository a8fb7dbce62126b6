"""Who is timed: what every backend can run, and how to call it on a case."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm

from .accuracy import PRECISIONS
from .cases import Case
from .cpu.onnx_lstm import runner
from .gpu.peers import FlashRNNStack, HasteStack

Module = Callable[..., Any]  # called as an nn.LSTM; an nn.Module if it trains


@dataclass(frozen=True)
class Backend:
    """``build`` makes a module from twins of equal weights, torch's and ours."""

    build: Callable[[nn.LSTM, fastlstm.LSTM], Module]
    packages: tuple[str, ...] = ()  # that must be there; the last one's version is told
    devices: tuple[str, ...] = ("cpu", "cuda")
    kinds: tuple[str, ...] = tuple(PRECISIONS)
    trains: bool = True
    plain: bool = False  # one direction without dropout, and no more

    def runs(self, case: Case, kind: str, training: bool, device: str) -> bool:
        """Whether it has what the problem needs, installed or not."""
        plain = not case.bidirectional and case.dropout == 0
        return (
            device in self.devices
            and kind in self.kinds
            and (self.trains or not training)
            and (plain or not self.plain)
        )

    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.packages[-1]) if self.packages else ""
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def _compiled(theirs: nn.LSTM, ours: fastlstm.LSTM) -> Module:
    """As a user gets it: Dynamo breaks the graph at an nn.LSTM and runs it as it is."""
    torch._dynamo.reset()
    return torch.compile(theirs)


def _onnxruntime(theirs: nn.LSTM, ours: fastlstm.LSTM) -> Module:
    run = runner(theirs, torch.get_num_threads())
    return lambda x: (run(x), None)


BACKENDS = {
    "fastlstm": Backend(lambda theirs, ours: ours),
    # Weights packed before the call, as ONNX Runtime's are.
    "prepacked": Backend(
        lambda theirs, ours: fastlstm.prepack(ours), devices=("cpu",), trains=False
    ),
    "torch": Backend(lambda theirs, ours: theirs),
    "compiled": Backend(_compiled),
    "onnxruntime": Backend(
        _onnxruntime, ("onnx", "onnxruntime"), devices=("cpu",), kinds=("fp32",), trains=False
    ),
    # Its fused kernel multiplies float32 on tensor cores.
    "flashrnn": Backend(
        lambda theirs, ours: FlashRNNStack(theirs), ("flashrnn",), devices=("cuda",),
        kinds=("tf32", "bf16", "fp16"), plain=True,
    ),
    "haste": Backend(
        lambda theirs, ours: HasteStack(theirs), ("haste_pytorch",), devices=("cuda",),
        kinds=("fp32", "fp64"), plain=True,
    ),
}  # fmt: skip

# How far from float64 a backend may be, as a part of the norm.
APART = {"fp64": 1e-10, "fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}


@dataclass
class Prepared:
    """What can be timed, and why the rest cannot; the modules are for other ways to call them."""

    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


NN_LSTM = ("torch", "compiled")


def prepared(
    case: Case, kind: str, training: bool, device: str, names: Sequence[str] = tuple(BACKENDS)
) -> Prepared:
    """Inference, or forward and backward, of each backend whose numbers are right.

    A peer that raises is absent, with what it said. nn.LSTM is timed though it may be wrong, for it
    is what all are measured against. Ours may neither raise nor be wrong.
    """
    dtype = PRECISIONS[kind][0]
    theirs, ours = case.twins(dtype, device)
    x, gradient = case.data(dtype, device)
    exact = _exact(theirs, case, x, gradient, training)
    found = Prepared()
    for name in names:
        backend = BACKENDS[name]
        if not backend.runs(case, kind, training, device):
            continue
        if missing := backend.missing():
            found.absent[name] = f"{' and '.join(missing)}: not installed"
            continue
        try:
            module = backend.build(theirs, ours)
            apart = _apart(_numbers(module, case, x, gradient, training), exact)
        except Exception as error:
            if name in ("fastlstm", "torch"):
                raise
            said = (str(error).splitlines() or [""])[0]
            found.absent[name] = f"{name} failed: {type(error).__name__}: {said}"
            continue
        if not apart <= APART[kind]:
            found.wrong[name] = (
                f"{name} is {apart:.2g} of the norm from float64: {case.name}, {kind}"
            )
            if name not in NN_LSTM:
                continue
        found.modules[name] = module
        found.calls[name] = _call(module, x, gradient, training)
    if "fastlstm" in found.wrong:
        raise AssertionError(found.wrong["fastlstm"])
    return found


def _call(module: Any, x: Tensor, gradient: Tensor, training: bool) -> Callable[[], object]:
    def train() -> None:
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    def infer() -> Tensor:
        with torch.no_grad():
            return module(x)[0]

    if isinstance(module, nn.Module):
        module.train(training)
    return train if training else infer


def _numbers(module: Any, case: Case, x: Tensor, gradient: Tensor, training: bool) -> list[Tensor]:
    """The output, and in training the input's gradient, unless dropout draws other masks."""
    if not training or case.dropout:
        if isinstance(module, nn.Module):
            module.eval()
        with torch.no_grad():
            return [module(x)[0]]
    leaf = x.clone().requires_grad_()
    output = module.train()(leaf)[0]
    return [output.detach(), *torch.autograd.grad(output, leaf, gradient)]


def _exact(
    theirs: nn.LSTM, case: Case, x: Tensor, gradient: Tensor, training: bool
) -> list[Tensor]:
    """nn.LSTM's numbers in float64."""
    wide = copy.deepcopy(theirs).double()
    return _numbers(wide, case, x.double(), gradient.double(), training)


def _apart(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(found, exact, strict=True)
    )
