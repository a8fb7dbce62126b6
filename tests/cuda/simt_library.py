"""The CUDA kernels on the CPU: builds tests/cuda/simt, calls it as the native operators are called.

``Emulated.lstm`` has ``reference.lstm``'s signature and a gradient, so that the kernels can be
compared with the float64 reference as every other implementation is.
"""

from __future__ import annotations

import ctypes as c
import fcntl
import functools
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlstm.ops.native import DTYPES
from fastlstm.stack import ALGORITHMS, NORMS, Call, Stack

SIMT = Path(__file__).parent / "simt"
ROOT = SIMT.parents[2]
RULES = ("recurrent_dropout", "zoneout_h", "zoneout_c", "cell_clip")
ORDERS = ("fifo", "lifo", "random", "block_up", "block_down", "uneven")
TURNS = ("issued", "first", "last", "drawn")
_i32, _i64, _p = c.c_int32, c.c_int64, c.c_void_p


def _struct(name: str, **fields: Any) -> type[c.Structure]:
    return type(name, (c.Structure,), {"_fields_": list(fields.items())})


# csrc/lstm.h and tests/cuda/simt/library.cpp
_Weights = _struct("LayerWeights", w_ih=_p, w_hh=_p, b_ih=_p, b_hh=_p, w_hr=_p,
                   **dict.fromkeys(NORMS, _p))  # fmt: skip
_Problem = _struct(
    "Problem",
    **{"dtype": _i32, "input_kind": _i32, "steps": _i64, "batch": _i64, "rows": _i64},
    **{"input_size": _i64, "hidden_size": _i64, "out_size": _i64, "projected": c.c_bool},
    **{"layers": _i32, "directions": _i32, "batch_sizes": _p, "input": _p, "stride_t": _i64},
    **{"stride_b": _i64, "h0": _p, "c0": _p, "weights": _p, "dropout": c.c_double, "seed": _p},
    **dict.fromkeys(RULES, c.c_double),
    layer_norm=c.c_bool,
)
_Saved = _struct("Saved", output=_p, hidden=_p, gates=_p, cells=_p)
_Forward = _struct("Forward", problem=_Problem, saved=_Saved, h_n=_p, c_n=_p, packed=_p)
_Backward = _struct(
    "Backward",
    **{"problem": _Problem, "saved": _Saved, "grad_output": _p, "grad_h_n": _p, "grad_c_n": _p},
    **{"grad_cells": _p},
    **{"grad_input": _p, "grad_h0": _p, "grad_c0": _p, "grads": _p},
)
_Options = _struct(
    "Options",
    **{"order": _i32, "races": _i32, "preempt": _i32, "tile": _i32, "algorithm": _i32},
    **{"allow_tf32": _i32, "capability": _i32, "shape": _i32, "active": _i32},
    **{"ctas": _i32, "units": _i32, "sequences": _i32, "chunk_steps": _i32, "turn": _i32},
    **{"forgotten": _i32},
    **{"seed": c.c_uint64},
)
_Report = _struct(
    "Report",
    **{"races": _i64, "launches": _i64, "largest_grid": _i64, "products": _i64},
    **{"unaligned": _i64, "follows": _i64},
    **{"error": c.c_char * 512, "first_race": c.c_char * 512},
)

_Plan = _struct(
    "Plan",
    **{"algorithm": _i32, "tensor_cores": c.c_bool, "cell_tile": _i32},
    **{"projection_tile": _i32, "single_step": c.c_bool},
    **{"ctas": _i32, "units": _i32, "sequences": _i32},
    **{"shape": _i32, "groups": _i32, "active": _i32, "chunk_steps": _i32},
    **{"microseconds": c.c_double, "reason": c.c_char_p},
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
    algorithm: str = "auto",
    steps: int = 100,
) -> Any:
    """The planner's choice for an unprojected stack on a device of 132 SMs."""
    problem = _Problem(
        dtype=DTYPES.index(dtype),
        steps=steps,
        batch=batch,
        hidden_size=hidden,
        out_size=hidden,
        layers=layers,
        directions=directions,
    )
    found = _Plan()
    chosen = ALGORITHMS.index(algorithm)
    library.simt_plan(c.byref(problem), backward, capability, 132, chosen, c.byref(found))
    return found


def build(variant: str, *targets: str, **variables: str) -> Path:
    """Build one variant (see tests/cuda/simt/Makefile); returns the last target."""
    words = [f"VARIANT={variant}", *(f"{key}={value}" for key, value in variables.items())]
    folder = Path(targets[-1]).parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of another process may build the same
        found = subprocess.run(
            ["make", "-j2", "-s", "-C", str(SIMT), *words, *targets], capture_output=True, text=True
        )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "warning:" not in found.stderr, found.stderr
    return Path(targets[-1])


def make(variant: str, **variables: str) -> Path:
    out = Path(variables.get("OUT", ROOT / "build" / "simt" / variant))
    return build(variant, str(out / "libsimt.so"), **variables)


@functools.cache
def load(variant: str) -> c.CDLL:
    return c.CDLL(str(make(variant)))


@dataclass(frozen=True)
class Schedule:
    """How the emulator runs the kernels.

    The planner chooses where tile, shape and chunk_steps are -1, and ctas and sequences 0.
    """

    order: str = "fifo"
    seed: int = 1
    races: bool = False
    preempt: int = 0
    tile: int = -1
    algorithm: str = "stepwise"
    backward_algorithm: str | None = None  # None: as forward
    allow_tf32: bool = False
    capability: int = 90
    shape: int = -1  # of a grid kernel
    active: int = 0  # groups of a launch; 0: all
    ctas: int = 0  # of a cluster, with ``units``; 0: the planner's choice
    units: int = 0
    sequences: int = 0
    chunk_steps: int = 0  # of layers that work at once; 0: one after the other
    turn: str = "issued"  # whose work goes first, of streams that need not wait for each other
    forgotten: int = -1  # which wait of one stream for another is left out; -1: none


class KernelError(RuntimeError):
    """The emulator refused: a deadlock, a fault, a kernel's own trap."""


@dataclass
class Emulated:
    library: c.CDLL
    schedule: Schedule = field(default_factory=Schedule)
    saves: bool = True  # what backward reads
    races: int = 0
    launches: int = 0
    products: int = 0  # large ones, which torch would run
    follows: int = 0  # waits of one stream for another
    unaligned: int = 0  # those whose rows are not whole pieces of 16 bytes
    first_race: str = ""

    def lstm(
        self,
        input: Tensor,
        state: tuple[Tensor | None, Tensor | None],
        weights: Sequence[Tensor],
        stack: Stack,
        call: Call,
    ) -> tuple[Tensor, ...]:
        results = _Function.apply(self, (stack, call), input, *state, *weights)
        return results if call.return_cells else results[:3]

    def call(self, name: str, args: c.Structure, tensors: Sequence[Tensor]) -> None:
        s, report = self.schedule, _Report()
        algorithm = s.algorithm
        if name == "simt_backward" and s.backward_algorithm is not None:
            algorithm = s.backward_algorithm
        options = _Options(
            order=ORDERS.index(s.order),
            races=s.races,
            preempt=s.preempt,
            tile=s.tile,
            algorithm=ALGORITHMS.index(algorithm),
            allow_tf32=s.allow_tf32,
            capability=s.capability,
            shape=s.shape,
            active=s.active,
            ctas=s.ctas,
            units=s.units,
            sequences=s.sequences,
            chunk_steps=s.chunk_steps,
            turn=TURNS.index(s.turn),
            forgotten=s.forgotten,
            seed=s.seed,
        )
        with self._tracked(tensors):
            getattr(self.library, name)(c.byref(args), c.byref(options), c.byref(report))
        if report.error:
            raise KernelError(report.error.decode())
        self.races += report.races
        self.launches += report.launches
        self.products += report.products
        self.unaligned += report.unaligned
        self.follows += report.follows
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
        stack: Stack,
        call: Call,
    ) -> None:
        dropout, seed, batch_sizes, _ = call
        self.kept = [x for x in (input, h0, c0, seed, *weights) if x is not None]
        self.dtype = weights[0].dtype
        self.accumulated = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.directions, self.cells = stack.directions, stack.pseudo_layers
        self.hidden_size, self.out_size = stack.hidden_size, stack.out_size
        kinds = {torch.int32: 1, torch.int64: 2}
        packed = batch_sizes is not None
        self.steps = batch_sizes.numel() if batch_sizes is not None else input.shape[0]
        self.batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
        self.rows = input.shape[0] if packed else self.steps * self.batch
        self.leading = (self.rows,) if packed else (self.steps, self.batch)
        self.batch_sizes = batch_sizes
        self.layers = stack.num_layers
        self.names = ["w_ih", "w_hh", *["b_ih", "b_hh"] * stack.bias]
        self.names += ["w_hr"] * (stack.proj_size > 0)
        self.names += NORMS * stack.layer_norm
        self.saved_per_unit = 12 if stack.layer_norm else 4
        self.weights = self.by_cell(weights)
        self.problem = _Problem(
            dtype=DTYPES.index(self.dtype),
            input_kind=kinds.get(input.dtype, 0),
            steps=self.steps,
            batch=self.batch,
            rows=self.rows,
            input_size=stack.input_size,
            hidden_size=stack.hidden_size,
            out_size=self.out_size,
            projected=stack.proj_size > 0,
            layers=stack.num_layers,
            directions=self.directions,
            batch_sizes=_pointer(batch_sizes),
            input=input.data_ptr(),
            stride_t=0 if packed else input.stride(0),
            stride_b=input.stride(0 if packed else 1),
            h0=_pointer(h0),
            c0=_pointer(c0),
            weights=c.cast(self.weights, c.c_void_p),
            dropout=dropout if stack.num_layers > 1 else 0.0,
            seed=_pointer(seed),
            layer_norm=stack.layer_norm,
            **{name: getattr(stack, name) for name in RULES},
        )

    def by_cell(self, tensors: Sequence[Tensor]) -> Any:
        array = (_Weights * self.cells)()
        for j, x in enumerate(tensors):
            cell, kind = divmod(j, len(self.names))
            setattr(array[cell], self.names[kind], _pointer(x))
        return array


def input_part(library: c.CDLL, x: Any, slots: int, units: int, rows: int) -> tuple[Tensor, Tensor]:
    """The first layer's input part by slots, for each direction, and all sums of biases."""
    call = _Call(x.input, x.h0, x.c0, x.weights, x.stack, x.call)
    args = _Forward(call.problem, _Saved())
    starts = _nan(call.directions, rows, slots, 4, units, dtype=torch.float32)
    biases = _nan(call.cells, 4 * call.hidden_size, dtype=torch.float32)
    sizes = (c.c_int(slots), c.c_int(units), _i64(rows))
    library.simt_input_part(c.byref(args), *sizes, _p(_pointer(starts)), _p(_pointer(biases)))
    return starts, biases


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emulated: Emulated, described: tuple, input: Any, *rest: Any) -> Any:
        h0, c0, *weights = rest
        call = _Call(input, h0, c0, weights, *described)
        wide = call.directions * call.out_size
        output = _nan(*call.leading, wide, dtype=call.dtype)
        h_n = _nan(call.cells, call.batch, call.out_size, dtype=call.dtype)
        c_n = _nan(call.cells, call.batch, call.hidden_size, dtype=call.dtype)
        hidden = _nan(call.layers - 1, call.rows, wide, dtype=call.dtype)
        saved = [output, hidden]
        gates = cells = None
        if emulated.saves:
            gates = _nan(
                call.cells, call.rows, call.saved_per_unit * call.hidden_size, dtype=call.dtype
            )
            cells = _nan(call.cells, call.rows, call.hidden_size, dtype=call.accumulated)
            saved += [gates, cells]
        places = _Saved(*map(_pointer, (output, hidden, gates, cells)))
        args = _Forward(call.problem, places, _pointer(h_n), _pointer(c_n))
        emulated.call("simt_forward", args, [*call.kept, *saved, h_n, c_n])
        ctx.emulated, ctx.described, ctx.saved = emulated, described, saved
        ctx.save_for_backward(input, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return output, h_n, c_n, cells

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, h0, c0, *weights = ctx.saved_tensors
        call = _Call(input, h0, c0, weights, *ctx.described)
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
