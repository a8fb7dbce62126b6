"""The CUDA kernels on the CPU: builds tests/simt, and calls it as the native operators are called.

``Emulated.lstm`` has ``reference.lstm``'s signature and a gradient, so that the kernels can be
compared with the float64 reference as every other implementation is.
"""

from __future__ import annotations

import ctypes as c
import functools
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlstm.algorithms import ALGORITHMS
from fastlstm.checks import NORMS
from fastlstm.native import DTYPES
from fastlstm.reference import CellRules

SIMT = Path(__file__).parent / "simt"
ROOT = SIMT.parents[1]
ORDERS = ("fifo", "lifo", "random", "block_up", "block_down")
_i32, _i64, _p = c.c_int32, c.c_int64, c.c_void_p


def _struct(name: str, **fields: Any) -> type[c.Structure]:
    return type(name, (c.Structure,), {"_fields_": list(fields.items())})


# csrc/lstm.h and tests/simt/library.cpp
_Weights = _struct("CellWeights", w_ih=_p, w_hh=_p, b_ih=_p, b_hh=_p, w_hr=_p,
                   **dict.fromkeys(NORMS, _p))  # fmt: skip
_Problem = _struct(
    "Problem",
    **{"dtype": _i32, "input_kind": _i32, "steps": _i64, "batch": _i64, "rows": _i64},
    **{"input_size": _i64, "hidden_size": _i64, "out_size": _i64, "projected": c.c_bool},
    **{"layers": _i32, "directions": _i32, "batch_sizes": _p, "input": _p, "stride_t": _i64},
    **{"stride_b": _i64, "h0": _p, "c0": _p, "weights": _p, "dropout": c.c_double, "seed": _p},
    **dict.fromkeys(CellRules._fields, c.c_double),
    layer_norm=c.c_bool,
)
_Saved = _struct("Saved", output=_p, hidden=_p, gates=_p, cells=_p)
_Forward = _struct("Forward", problem=_Problem, saved=_Saved, h_n=_p, c_n=_p)
_Backward = _struct(
    "Backward",
    **{"problem": _Problem, "saved": _Saved, "grad_output": _p, "grad_h_n": _p, "grad_c_n": _p},
    **{"grad_cells": _p},
    **{"grad_input": _p, "grad_h0": _p, "grad_c0": _p, "grads": _p},
)
_Options = _struct(
    "Options",
    **{"order": _i32, "races": _i32, "preempt": _i32, "tile": _i32, "algorithm": _i32},
    **{"allow_tf32": _i32, "capability": _i32, "shape": _i32, "groups": _i32, "active": _i32},
    **{"wave": _i32, "seed": c.c_uint64},
)
_Report = _struct(
    "Report",
    **{"races": _i64, "launches": _i64, "largest_grid": _i64, "products": _i64},
    **{"error": c.c_char * 512, "first_race": c.c_char * 512},
)

_Plan = _struct(
    "Plan",
    **{"algorithm": _i32, "tensor_cores": c.c_bool, "gates": _i32, "project": _i32},
    **{"hidden": _i32, "cell": _i32, "shape": _i32, "groups": _i32, "active": _i32},
    **{"wave": _i32, "microseconds": c.c_double, "reason": c.c_char_p},
)


def plan(
    library: c.CDLL,
    dtype: torch.dtype,
    hidden: int,
    batch: int,
    capability: int = 90,
    backward: bool = False,
    layers: int = 1,
    directions: int = 1,
) -> Any:
    """The planner's choice for an unprojected stack on a device of 132 SMs."""
    problem = _Problem(
        dtype=DTYPES.index(dtype),
        steps=100,
        batch=batch,
        hidden_size=hidden,
        out_size=hidden,
        layers=layers,
        directions=directions,
    )
    found = _Plan()
    library.simt_plan(c.byref(problem), backward, capability, 132, c.byref(found))
    return found


def make(variant: str, **variables: str) -> Path:
    """Build one variant (see tests/simt/Makefile); returns the library."""
    words = [f"VARIANT={variant}", *(f"{key}={value}" for key, value in variables.items())]
    found = subprocess.run(
        ["make", "-j2", "-s", "-C", str(SIMT), *words], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "warning:" not in found.stderr, found.stderr
    return Path(variables.get("OUT", ROOT / "build" / "simt" / variant)) / "libsimt.so"


@functools.cache
def load(variant: str) -> c.CDLL:
    return c.CDLL(str(make(variant)))


@dataclass(frozen=True)
class Schedule:
    """How the emulator runs the kernels; tile and shape -1, wave 0: the planner's choice."""

    order: str = "fifo"
    seed: int = 1
    races: bool = False
    preempt: int = 0
    tile: int = -1
    algorithm: str = "stepwise"
    allow_tf32: bool = False
    capability: int = 90
    shape: int = -1  # of a persistent kernel
    groups: int = 1  # at least so many, with ``shape``
    active: int = 0  # groups of a launch; 0: all
    wave: int = 0


class KernelError(RuntimeError):
    """The emulator refused: a deadlock, a fault, a kernel's own trap."""


@dataclass
class Emulated:
    library: c.CDLL
    schedule: Schedule = field(default_factory=Schedule)
    races: int = 0
    launches: int = 0
    products: int = 0  # large ones, which torch would run
    first_race: str = ""

    def lstm(
        self,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        **options: Any,
    ) -> tuple[Tensor, ...]:
        return_cells = options.pop("return_cells", False)
        found = _Function.apply(self, options, input, h0, c0, *weights)
        return found if return_cells else found[:3]

    def call(self, name: str, args: c.Structure, tensors: Sequence[Tensor]) -> None:
        s, report = self.schedule, _Report()
        options = _Options(
            order=ORDERS.index(s.order),
            races=s.races,
            preempt=s.preempt,
            tile=s.tile,
            algorithm=ALGORITHMS.index(s.algorithm),
            allow_tf32=s.allow_tf32,
            capability=s.capability,
            shape=s.shape,
            groups=s.groups,
            active=s.active,
            wave=s.wave,
            seed=s.seed,
        )
        with self._tracked(tensors):
            getattr(self.library, name)(c.byref(args), c.byref(options), c.byref(report))
        if report.error:
            raise KernelError(report.error.decode())
        self.races += report.races
        self.launches += report.launches
        self.products += report.products
        self.first_race = self.first_race or report.first_race.decode()

    @contextmanager
    def _tracked(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        used = [x for x in tensors if x.numel() > 0]
        for j, x in enumerate(used):
            size = c.c_size_t(x.untyped_storage().nbytes())
            name = f"tensor {j} {tuple(x.shape)}".encode()
            self.library.simt_track(c.c_void_p(x.untyped_storage().data_ptr()), size, name)
        yield
        for x in used:
            self.library.simt_untrack(c.c_void_p(x.untyped_storage().data_ptr()))


def _pointer(x: Tensor | None) -> int | None:
    return x.data_ptr() if x is not None and x.numel() > 0 else None


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


class _Call:
    """The plain structs of one problem, and the tensors that they point into."""

    def __init__(
        self,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        *,
        hidden_size: int,
        num_layers: int = 1,
        has_bias: bool = True,
        proj_size: int = 0,
        bidirectional: bool = False,
        dropout: float = 0.0,
        seed: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        layer_norm: bool = False,
        **rules: float,
    ) -> None:
        self.kept = [x for x in (input, h0, c0, seed, *weights) if x is not None]
        self.dtype = weights[0].dtype
        self.accumulated = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.per_cell = 2 + 2 * has_bias + (proj_size > 0) + 4 * layer_norm
        self.directions = 1 + bidirectional
        self.cells = num_layers * self.directions
        self.hidden_size, self.out_size = hidden_size, proj_size or hidden_size
        kinds = {torch.int32: 1, torch.int64: 2}
        packed = batch_sizes is not None
        self.steps = batch_sizes.numel() if batch_sizes is not None else input.shape[0]
        self.batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
        self.rows = input.shape[0] if packed else self.steps * self.batch
        self.leading = (self.rows,) if packed else (self.steps, self.batch)
        self.batch_sizes = batch_sizes
        self.layers = num_layers
        self.names = ["w_ih", "w_hh", *["b_ih", "b_hh"] * has_bias, *["w_hr"] * (proj_size > 0)]
        self.names += NORMS * layer_norm
        self.saved_per_unit = 12 if layer_norm else 4
        self.weights = self.by_cell(weights)
        self.problem = _Problem(
            dtype=DTYPES.index(self.dtype),
            input_kind=kinds.get(input.dtype, 0),
            steps=self.steps,
            batch=self.batch,
            rows=self.rows,
            input_size=weights[0].shape[1],
            hidden_size=hidden_size,
            out_size=self.out_size,
            projected=proj_size > 0,
            layers=num_layers,
            directions=self.directions,
            batch_sizes=_pointer(batch_sizes),
            input=input.data_ptr(),
            stride_t=0 if packed else input.stride(0),
            stride_b=input.stride(0 if packed else 1),
            h0=_pointer(h0),
            c0=_pointer(c0),
            weights=c.cast(self.weights, c.c_void_p),
            dropout=dropout if num_layers > 1 else 0.0,
            seed=_pointer(seed),
            layer_norm=layer_norm,
            **rules,
        )

    def by_cell(self, tensors: Sequence[Tensor]) -> Any:
        array = (_Weights * self.cells)()
        for j, x in enumerate(tensors):
            cell, kind = divmod(j, len(self.names))
            setattr(array[cell], self.names[kind], _pointer(x))
        return array


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emulated: Emulated, options: dict, input: Any, *rest: Any) -> Any:
        h0, c0, *weights = rest
        call = _Call(input, h0, c0, weights, **options)
        wide = call.directions * call.out_size
        output = _nan(*call.leading, wide, dtype=call.dtype)
        h_n = _nan(call.cells, call.batch, call.out_size, dtype=call.dtype)
        c_n = _nan(call.cells, call.batch, call.hidden_size, dtype=call.dtype)
        hidden = _nan(call.layers - 1, call.rows, wide, dtype=call.dtype)
        gates = _nan(
            call.cells, call.rows, call.saved_per_unit * call.hidden_size, dtype=call.dtype
        )
        cells = _nan(call.cells, call.rows, call.hidden_size, dtype=call.accumulated)
        saved = [output, hidden, gates, cells]
        args = _Forward(call.problem, _Saved(*map(_pointer, saved)), _pointer(h_n), _pointer(c_n))
        emulated.call("simt_forward", args, [*call.kept, *saved, h_n, c_n])
        ctx.emulated, ctx.options, ctx.saved = emulated, options, saved
        ctx.save_for_backward(input, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return output, h_n, c_n, cells

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, h0, c0, *weights = ctx.saved_tensors
        call = _Call(input, h0, c0, weights, **ctx.options)
        arriving = [g.contiguous() if g is not None else None for g in grads]
        _, _, *needs = ctx.needs_input_grad
        needed = [
            torch.full(x.shape, torch.nan, dtype=x.dtype) if need else None
            for x, need in zip((input, h0, c0, *weights), needs, strict=True)
        ]
        into = call.by_cell(needed[3:])
        args = _Backward(
            call.problem,
            _Saved(*map(_pointer, ctx.saved)),
            *(_pointer(x) for x in (*arriving, *needed[:3])),
            c.cast(into, c.c_void_p),
        )
        used = [x for x in (*arriving, *needed) if x is not None]
        ctx.emulated.call("simt_backward", args, [*call.kept, *ctx.saved, *used])
        return None, None, *needed
