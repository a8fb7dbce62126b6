"""Random LSTM problems, their options, and the float64 reference's answer to each.

The tests of every backend and the check on a GPU draw their problems here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlstm import ops, reference
from fastlstm.stack import Call, Stack


@dataclass(frozen=True)
class Problem:
    """One stack and one batch. Packed: random lengths, longest first, the first of length T."""

    input_size: int = 5
    hidden_size: int = 7
    num_layers: int = 1
    batch: int = 3
    steps: int = 4
    has_bias: bool = True
    proj_size: int = 0
    bidirectional: bool = False
    dropout: float = 0.0
    index: torch.dtype | None = None
    packed: bool = False
    states: bool = True
    cells: bool = False  # whether the cell states of every step are asked for
    recurrent_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    cell_clip: float = 0.0
    layer_norm: bool = False
    training: bool = True  # else zoneout is its expectation
    dtype: torch.dtype = torch.float32
    random_seed: int = 0

    @property
    def stack(self) -> Stack:
        return Stack(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.has_bias,
            self.proj_size,
            self.bidirectional,
            self.recurrent_dropout,
            self.zoneout_h,
            self.zoneout_c,
            self.cell_clip,
            self.layer_norm,
        )


# What Problem's other fields are, for problems that together use every option.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one of everything": {"input_size": 1, "hidden_size": 1, "batch": 1, "steps": 1},
    "no bias": {"has_bias": False},
    "zero states": {"states": False},
    "both directions": {"bidirectional": True},
    "three layers": {"num_layers": 3},
    "dropout": {"num_layers": 2, "dropout": 0.4, "hidden_size": 33},
    "dropout of everything": {"num_layers": 2, "dropout": 1.0},
    "projection": {"proj_size": 3},
    "wide projection": {"hidden_size": 65, "proj_size": 34, "num_layers": 2, "steps": 2},
    "packed": {"packed": True, "batch": 13, "steps": 9},
    "packed, both directions": {"packed": True, "bidirectional": True, "num_layers": 2, "batch": 9},
    "index": {"index": torch.int64, "num_layers": 2},
    "index, few rows": {"index": torch.int32, "packed": True, "input_size": 300, "batch": 9},
    "index, large vocabulary": {"index": torch.int64, "input_size": 1500, "has_bias": False},
    "cell clip": {"cell_clip": 0.3, "proj_size": 4, "steps": 9, "batch": 5},
    "recurrent dropout": {"recurrent_dropout": 0.3, "proj_size": 4, "num_layers": 2},
    "zoneout": {
        "zoneout_h": 0.4, "zoneout_c": 0.3, "num_layers": 2, "steps": 9, "hidden_size": 33,
    },
    "zoneout's expectation": {
        "zoneout_h": 0.4, "zoneout_c": 0.3, "training": False, "states": False,
    },
    "every rule": {
        "recurrent_dropout": 0.2, "zoneout_h": 0.3, "zoneout_c": 0.4, "cell_clip": 1.0,
        "num_layers": 2, "bidirectional": True, "packed": True, "dropout": 0.3, "batch": 11,
        "steps": 9, "index": torch.int64,
    },
    "everything": {
        "num_layers": 2, "proj_size": 9, "hidden_size": 33, "bidirectional": True, "packed": True,
        "dropout": 0.3, "batch": 11, "steps": 6, "index": torch.int64, "input_size": 19,
    },
}  # fmt: skip


# The same with layer normalisation.
_NORMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "one unit": {"hidden_size": 1, "input_size": 1, "batch": 1, "steps": 1},
    "no bias": {"has_bias": False, "states": False, "hidden_size": 33},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "large batch": {"batch": 200, "steps": 2},
    "large vocabulary": {"index": torch.int64, "input_size": 1500},
    "every rule": OPTIONS["every rule"],
}
NORMED = {f"layer norm, {name}": fields | {"layer_norm": True} for name, fields in _NORMED.items()}


@dataclass
class Tensors:
    """One draw of a problem, as arguments of ``reference.lstm`` and of all that it judges."""

    input: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    stack: Stack
    call: Call

    @property
    def state(self) -> tuple[Tensor | None, Tensor | None]:
        return self.h0, self.c0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.input, self.state, self.weights, self.stack, self.call

    def leaves(self) -> list[Tensor]:
        tensors = [self.input, self.h0, self.c0, *self.weights]
        return [x for x in tensors if x is not None and x.requires_grad]

    def to(self, target: torch.dtype | torch.device) -> Tensors:
        """The same values as new leaves of another type or on another device."""

        def convert(x: Any) -> Any:
            if x is None or (isinstance(target, torch.dtype) and not x.is_floating_point()):
                return x
            return x.detach().to(target).requires_grad_(x.requires_grad)

        call = self.call._replace(seed=convert(self.call.seed))
        weights = [convert(w) for w in self.weights]
        states = convert(self.h0), convert(self.c0)
        return Tensors(convert(self.input), *states, weights, self.stack, call)


def make(p: Problem) -> Tensors:
    rng = torch.Generator().manual_seed(p.random_seed)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=rng, dtype=torch.float64) * scale
        return values.to(p.dtype).requires_grad_()

    stack, scale = p.stack, p.hidden_size**-0.5
    weights = [
        leaf(*shape, scale=1.0 if stack.weight_name(j).startswith("norm") else scale)
        for j, shape in enumerate(stack.weight_shapes())
    ]
    leading: tuple[int, ...] = (p.steps, p.batch)
    batch_sizes = None
    if p.packed:
        lengths = torch.randint(1, p.steps + 1, (p.batch,), generator=rng)
        lengths[0] = p.steps
        batch_sizes = torch.stack([(lengths > t).sum() for t in range(p.steps)])
        leading = (int(batch_sizes.sum()),)
    if p.index is not None:
        x = torch.randint(0, p.input_size, leading, generator=rng).to(p.index)
    else:
        x = leaf(*leading, p.input_size)
    draws = p.dropout > 0 or (p.training and stack.needs_seed)
    seed = torch.tensor([1234567890123 + p.random_seed]) if draws else None
    return Tensors(
        x,
        leaf(stack.pseudo_layers, p.batch, stack.out_size) if p.states else None,
        leaf(stack.pseudo_layers, p.batch, stack.hidden_size) if p.states else None,
        weights,
        stack,
        Call(p.dropout, seed, batch_sizes, p.cells),
    )


def outputs_and_gradients(lstm: Any, x: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all leaves for fixed random gradients of the outputs."""
    outputs = list(lstm(*x.arguments))
    rng = torch.Generator().manual_seed(7)
    grads = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y) for y in outputs]
    return outputs, list(torch.autograd.grad(outputs, x.leaves(), grads))


# Relative L2 distance from the float64 reference on the same (rounded) values. Half types round h
# at every step and the saved gates: a few units of their last place (2^-8, 2^-11). A tensor whose
# norm is under a hundredth of the largest is what terms of ordinary size left when they cancelled
# (torch's own float32 loses the same digits there), so it is measured against that hundredth.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


# Normalising divides by the spread of a few rounded numbers, which may be small.
NORM_FACTOR = 3


def tolerance(p: Problem) -> float:
    return TOLERANCE[p.dtype] * (NORM_FACTOR if p.layer_norm else 1)


def assert_matches_reference(p: Problem) -> None:
    x = make(p)
    found = outputs_and_gradients(ops.lstm, x)
    expected = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    for kind, ours, theirs in zip(("output", "gradient"), found, expected, strict=True):
        floor = 1e-2 * max(b.norm() for b in theirs)
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.shape == b.shape
            assert a.dtype == p.dtype
            error = (a.double() - b).norm() / torch.maximum(b.norm(), floor).clamp_min(1e-6)
            assert error < tolerance(p), f"{kind} {j} of {p}: relative error {error:.2e}"
