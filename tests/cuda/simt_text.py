"""The CUDA kernels that draw text on the CPU: builds tests/cuda/simt, called as the operator is."""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from simt_library import ORDERS, ROOT, KernelError, _struct, build
from torch import Tensor

from fastlstm.generation.draw import Draw
from fastlstm.generation.packed_weights import PackedLSTM

_i32, _i64, _p, _double = c.c_int32, c.c_int64, c.c_void_p, c.c_double

# csrc/generate.h and tests/cuda/simt/text.cpp
_Matrix = _struct("PackedMatrix", data=_p, scale=_p, depth=_i64)
_Layer = _struct("GenerateLayer", ih=_Matrix, hh=_Matrix, hr=_Matrix, bias=_p)
_Rules = _struct("CellOptions", recurrent_dropout=_double, zoneout_h=_double, zoneout_c=_double,
                 clip=_double)  # fmt: skip
_Generate = _struct(
    "Generate",
    **{"storage": _i32, "batch": _i64, "prime_steps": _i64, "length": _i64, "vocabulary": _i64},
    **{"hidden_size": _i64, "out_size": _i64, "projected": c.c_bool, "layers": _i32, "prime": _p},
    **{"h0": _p, "c0": _p, "table": _p, "weights": _p, "cell": _Rules, "decoder": _Matrix},
    **{"decoder_bias": _p, "temperature": _double, "top_p": _double, "top_k": _i64, "seed": _p},
    **{"offset": _i64, "tokens": _p, "h_n": _p, "c_n": _p},
)
_Options = _struct(
    "TextOptions",
    **{"order": _i32, "races": _i32, "preempt": _i32, "capability": _i32, "sms": _i32},
    **{"units": _i32, "tiles": _i32, "active": _i32, "seed": c.c_uint64},
)
_Report = _struct(
    "TextReport",
    **{"races": _i64, "launches": _i64, "largest_grid": _i64},
    **{"error": c.c_char * 512, "first_race": c.c_char * 512},
)
STORAGES = ("fp32", "fp64", "bf16", "int8", "fp16")  # csrc/generate.h's order


def make(variant: str, **variables: str) -> Path:
    """Build one variant (see tests/cuda/simt/Makefile); returns the library."""
    out = Path(variables.get("OUT", ROOT / "build" / "simt" / variant))
    return build(variant, str(out / "libtext.so"), **variables)


@functools.cache
def load(variant: str) -> c.CDLL:
    return c.CDLL(str(make(variant)))


@dataclass(frozen=True)
class Schedule:
    """How the emulator runs the kernels; units 0: the planner's choice of shape and groups."""

    order: str = "random"
    seed: int = 1
    races: bool = False
    preempt: int = 0
    units: int = 4
    tiles: int = 1
    active: int = 0  # groups of a launch; 0: all
    capability: int = 90
    sms: int = 132


@dataclass
class Writer:
    """Draws text from packed weights (without words), as the operator does."""

    library: c.CDLL
    schedule: Schedule = field(default_factory=Schedule)
    races: int = 0
    launches: int = 0
    largest_grid: int = 0
    first_race: str = ""

    def text(
        self,
        packed: PackedLSTM,
        prime: Tensor,
        length: int,
        hx: Sequence[Tensor] | None,
        how: Draw,
        offset: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        stack, batch = packed.stack, prime.shape[1]
        table, biases = packed.table.contiguous(), [x.contiguous() for x in packed.biases]
        scales = [x.contiguous() for x in packed.scales]
        factors = [x.data_ptr() for x in scales] or [None] * len(packed.matrices)
        rest = zip(packed.matrices, factors, strict=True)

        def matrix(depth: int) -> c.Structure:
            data, factor = next(rest)
            return _Matrix(data.data_ptr(), factor, depth)

        layers = (_Layer * stack.num_layers)()
        for layer in range(stack.num_layers):
            if layer > 0:
                layers[layer].ih = matrix(stack.out_size)
                layers[layer].bias = biases[layer - 1].data_ptr()
            layers[layer].hh = matrix(stack.out_size)
            if stack.proj_size:
                layers[layer].hr = matrix(stack.hidden_size)
        tokens = torch.full((length, batch), -1)
        ends = [
            torch.full((stack.num_layers, batch, n), torch.nan, dtype=packed.computed)
            for n in (stack.out_size, stack.hidden_size)
        ]
        h0, c0 = hx if hx is not None else (None, None)
        call = _Generate(
            storage=STORAGES.index(packed.weights),
            batch=batch,
            prime_steps=len(prime),
            length=length,
            vocabulary=stack.input_size,
            hidden_size=stack.hidden_size,
            out_size=stack.out_size,
            projected=stack.proj_size > 0,
            layers=stack.num_layers,
            prime=prime.data_ptr(),
            h0=h0.data_ptr() if h0 is not None else None,
            c0=c0.data_ptr() if c0 is not None else None,
            table=table.data_ptr(),
            weights=c.cast(layers, c.c_void_p),
            cell=_Rules(0, stack.zoneout_h, stack.zoneout_c, stack.cell_clip),
            decoder=matrix(stack.out_size),
            decoder_bias=biases[-1].data_ptr(),
            temperature=how.temperature,
            top_p=1.0 if how.top_p is None else how.top_p,
            top_k=how.top_k or 0,
            seed=how.seed.data_ptr() if how.seed is not None else None,
            offset=offset,
            tokens=tokens.data_ptr(),
            h_n=ends[0].data_ptr(),
            c_n=ends[1].data_ptr(),
        )
        self._run(call, [prime, tokens, *ends, *(x for x in (h0, c0) if x is not None)])
        return tokens, (ends[0], ends[1])

    def _run(self, call: c.Structure, tensors: Sequence[Tensor]) -> None:
        s, report = self.schedule, _Report()
        options = _Options(
            order=ORDERS.index(s.order),
            races=s.races,
            preempt=s.preempt,
            capability=s.capability,
            sms=s.sms,
            units=s.units,
            tiles=s.tiles,
            active=s.active,
            seed=s.seed,
        )
        for j, x in enumerate(tensors):
            self.library.simt_track(
                c.c_void_p(x.data_ptr()), c.c_size_t(x.nbytes), f"tensor {j}".encode()
            )
        self.library.simt_generate(c.byref(call), c.byref(options), c.byref(report))
        for x in tensors:
            self.library.simt_untrack(c.c_void_p(x.data_ptr()))
        if report.error:
            raise KernelError(report.error.decode())
        self.races += report.races
        self.launches += report.launches
        self.largest_grid = max(self.largest_grid, report.largest_grid)
        self.first_race = self.first_race or report.first_race.decode()
