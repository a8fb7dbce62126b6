"""Distances from the float64 reference: of our kernels, and of torch's LSTM beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlstm import ops, reference
from fastlstm.stack import Call, Stack

from .problems import (
    NORM_FACTOR,
    TOLERANCE,
    Problem,
    Tensors,
    make,
    outputs_and_gradients,
)

# name: dtype, whether float32 may use tf32, tolerance
PRECISIONS = {
    "bf16": (torch.bfloat16, False, TOLERANCE[torch.bfloat16]),
    "fp16": (torch.float16, False, TOLERANCE[torch.float16]),
    "tf32": (torch.float32, True, 3e-3),
    "fp32": (torch.float32, False, TOLERANCE[torch.float32]),
    "fp64": (torch.float64, False, TOLERANCE[torch.float64]),
}
# How far to the nearest number, at the most, relative to a number.
_ROUNDOFF = {"bf16": 2**-8, "fp16": 2**-11, "tf32": 2**-11, "fp32": 2**-24, "fp64": 2**-53}
_DRAWS = 4  # of Disturbed


@contextmanager
def precision(name: str) -> Iterator[tuple[torch.dtype, float]]:
    """A dtype and its tolerance, with tf32 allowed or not, for RNNs and products alike."""
    dtype, tf32, tolerance = PRECISIONS[name]
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield dtype, tolerance
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class Distance:
    """The worst over all outputs and gradients and all seeds, beside its limit."""

    relative: float  # ||found - exact|| / ||exact||
    largest: float  # max |found - exact| / max |exact|
    where: str
    limit: float = 1.0  # of relative, for the seed in question

    @property
    def within(self) -> bool:
        """Whether it is small enough; a NaN is not."""
        return self.relative < self.limit


def torch_lstm(
    input: Tensor, state: Any, weights: Sequence[Tensor], stack: Stack, call: Call
) -> Any:
    """torch's own LSTM behind the reference's signature; without dropout or a seed."""
    like, batch_sizes, (h0, c0) = weights[0], call.batch_sizes, state
    if not input.is_floating_point():
        input = F.one_hot(input.long(), like.shape[1]).to(like)
    batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    hx = (
        like.new_zeros(stack.pseudo_layers, batch, stack.out_size) if h0 is None else h0,
        like.new_zeros(stack.pseudo_layers, batch, stack.hidden_size) if c0 is None else c0,
    )
    rest = (stack.bias, stack.num_layers, 0.0, True, stack.bidirectional)
    lstm: Any = torch.lstm
    if batch_sizes is not None:
        return lstm(input, batch_sizes, hx, weights, *rest)
    return lstm(input, hx, weights, *rest, False)


@torch.no_grad()
def distance(found: Any, exact: Any) -> Distance:
    """A gradient under a hundredth of the largest is measured against that (problems.TOLERANCE)."""
    worst = Distance(0.0, 0.0, "")
    for kind, ours, theirs in zip(("output", "gradient"), found, exact, strict=True):
        floor = 1e-2 * max(float(b.norm()) for b in theirs)
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            error = a.double() - b
            relative = float(error.norm()) / max(float(b.norm()), floor, 1e-6)
            largest = float(error.abs().max()) / max(float(b.abs().max()), 1e-6)
            if not relative <= worst.relative:  # a NaN is the worst
                worst = Distance(relative, largest, f"{kind} {j}")
            if worst.relative != worst.relative:
                return worst
    return worst


class Disturbed(TorchDispatchMode):
    """Rounds as much as a type does, at random: what no implementation in that type can avoid.

    The operands of all products move by up to the type's roundoff, and the means of layer
    normalisation by that of float64, the reference's own type.
    """

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        self.roundoff = _ROUNDOFF[kind]
        self.rng = torch.Generator().manual_seed(seed)

    def _moved(self, x: Tensor, roundoff: float) -> Tensor:
        drawn = torch.rand(x.shape, generator=self.rng, dtype=x.dtype)
        return x * (1 + roundoff * (2 * drawn - 1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            args = [*args[:-2], *(self._moved(x, self.roundoff) for x in args[-2:])]
        found = func(*args, **(kwargs or {}))
        if name != "aten::native_layer_norm":
            return found
        y, mean, scale = found
        moved = self._moved(mean, 2 * _ROUNDOFF["fp64"])
        return y - (moved - mean) * scale * args[2], moved, scale


@functools.cache  # algorithms share it
def limit_of(problem: Problem, kind: str) -> float:
    """The largest distance that is allowed in this draw of the problem.

    Normalisation with random gains multiplies roundings, step by step, in some draws far more than
    in others. There the limit is twice the worst of a few runs of the float64 reference whose
    products were rounded as in ``kind``.
    """
    tolerance = PRECISIONS[kind][2]
    if not problem.layer_norm:
        return tolerance
    x: Tensors = make(problem).to(torch.float64)
    exact = outputs_and_gradients(reference.lstm, x)
    worst = 0.0
    for draw in range(_DRAWS):
        with Disturbed(kind, draw):
            found = outputs_and_gradients(reference.lstm, x)
        worst = max(worst, distance(found, exact).relative)
    return max(NORM_FACTOR * tolerance, 2 * worst)


def distances(
    problem: Problem,
    seeds: int,
    device: torch.device,
    candidates: dict[str, Callable[..., Any]],
    kind: str,
) -> dict[str, Distance]:
    """Each candidate's worst distance over ``seeds`` draws, worst in terms of its limit."""
    worst: dict[str, Distance] = {}
    for seed in range(seeds):
        drawn = replace(problem, random_seed=seed)
        x = make(drawn).to(device)
        exact = outputs_and_gradients(reference.lstm, x.to(torch.float64))
        found = {name: outputs_and_gradients(lstm, x) for name, lstm in candidates.items()}
        limit = limit_of(drawn, kind)
        for name, results in found.items():
            d = replace(distance(results, exact), limit=limit)
            before = worst.get(name)
            if before is None or not d.relative / d.limit <= before.relative / before.limit:
                worst[name] = d
    return worst


def candidates_for(problem: Problem) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"fastlstm": ops.lstm}
    plain = not (problem.stack.has_rules or problem.layer_norm)
    if plain and problem.dropout == 0:  # torch draws other masks, and has no other cells
        found["torch"] = torch_lstm
    return found
