"""The CPU kernels compiled for 64-bit ARM, and calls of them that an emulator runs.

The kernels are called through driver.cpp, a program. A call's plain structs and all tensors that
they point to are laid out as one piece of memory, which goes to the program and comes back.
``Kernels.lstm`` has ``reference.lstm``'s signature and a gradient; ``Texts.text`` draws text.
"""

from __future__ import annotations

import ctypes as c
import fcntl
import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simt_library
import simt_text
import torch
from setuptools import Extension
from torch import Tensor

import setup as build
from fastlstm.ops.native import DTYPES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "arm"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
DISASSEMBLER = "aarch64-linux-gnu-objdump"
LIBRARIES = "/usr/aarch64-linux-gnu"

_GAP = bytes([0xA5]) * 64  # between two blocks: what a kernel writes past one is seen
Activations = simt_library._struct(
    "Activations", dtype=c.c_int32, n=c.c_int64, x=c.c_void_p, sigmoid=c.c_void_p, tanh=c.c_void_p
)


def missing() -> str:
    """What this machine lacks, by Debian's names; empty where the kernels can be run."""
    packages = {EMULATOR: "qemu-user", COMPILER: "g++-aarch64-linux-gnu"}
    lacking = [package for name, package in packages.items() if shutil.which(name) is None]
    return f"needs {' and '.join(lacking)}" if lacking else ""


def make() -> Path:
    """Compile the CPU module as setup.py does on such a machine, and link the kernels' driver.

    The module itself is not linked: no torch for that processor is here. A warning is an error.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch_folder = build.find_torch()
    assert torch_folder is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        patch.setenv("CXX", f"{COMPILER} -Werror")
        sources = build.cpu_sources()
        rules = build.ninja_file(Extension("fastlstm._C", sources), torch_folder, FOLDER / "module")
    objects = {path: str(Path(path).relative_to("csrc").with_suffix(".o")) for path in sources}
    kernels = [name for path, name in objects.items() if path.startswith("csrc/cpu/")]
    rules += "\n".join([
        f"build driver.o: compile {build.ninja_path(Path(__file__).parent / 'driver.cpp')}",
        "rule program",
        "  command = $cxx -pthread $in -o $out",
        f"build driver: program driver.o scratch.o {' '.join(kernels)}",
        "",
    ])  # fmt: skip
    command = [build.find_ninja(), "-C", str(FOLDER), "-j", str(build.jobs())]
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of the tests builds the same
        (FOLDER / "build.ninja").write_text(rules)
        done = subprocess.run(
            [*command, "driver", *objects.values()], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout
    return FOLDER / "driver"


class _Memory:
    """A call as one piece of memory: its structs first, then all tensors that they point to."""

    def __init__(self, call: c.Structure, arrays: Sequence[c.Array], tensors: Sequence[Tensor]):
        self.content = bytearray(bytes(call))
        self.struct_bytes = len(self.content)
        self.pointers: list[int] = []
        self.blocks: list[tuple[int, int, int]] = []  # address, bytes, where they are
        structs: list[tuple[Any, int]] = [(type(call), 0)]
        for array in arrays:
            start = self._add(c.addressof(array), c.sizeof(array))
            each = c.sizeof(array._type_)
            structs += [(array._type_, start + j * each) for j in range(len(array))]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        self.tensors = len(storages)
        for address, storage in storages.items():
            self._add(address, storage.nbytes())
        self.content += _GAP
        for kind, start in structs:
            self._relocate(kind, start)

    def _add(self, address: int, size: int) -> int:
        self.content += _GAP + bytes(-len(self.content) % 64)
        start = len(self.content)
        self.content += c.string_at(address, size)
        self.blocks.append((address, size, start))
        return start

    def _relocate(self, kind: Any, start: int) -> None:
        """Make offsets of a struct's pointers."""
        for name, field in kind._fields_:
            place = start + getattr(kind, name).offset
            if issubclass(field, c.Structure):
                self._relocate(field, place)
            elif field is c.c_void_p:
                (address,) = struct.unpack_from("<q", self.content, place)
                if address:
                    struct.pack_into("<q", self.content, place, self._offset_of(address))
                    self.pointers.append(place)

    def _offset_of(self, address: int) -> int:
        for begin, size, start in self.blocks:
            if begin <= address < begin + size:
                return start + address - begin
        raise AssertionError("a pointer leads to a tensor that was not handed over")

    def message(self) -> bytes:
        header = struct.pack(
            "<3q", self.struct_bytes, len(self.pointers), len(self.content)
        ) + struct.pack(f"<{len(self.pointers)}q", *self.pointers)
        return header + bytes(self.content)

    def take(self, after: bytes) -> None:
        """Copy the tensors, the last blocks, back; nothing between blocks may have changed."""
        assert len(after) == len(self.content)
        for _, size, start in self.blocks:
            assert after[start + size :].startswith(_GAP), "a kernel wrote past its memory"
        for address, size, start in self.blocks[len(self.blocks) - self.tensors :]:
            c.memmove(address, after[start : start + size], size)


def run(
    driver: Path,
    name: str,
    threads: int,
    call: c.Structure,
    arrays: Sequence[c.Array],
    tensors: Sequence[Tensor],
) -> None:
    """Run one call; what it writes is in the tensors afterwards."""
    used = [x for x in tensors if x.numel() > 0]
    memory = _Memory(call, arrays, used)
    command = [EMULATOR, "-L", LIBRARIES, str(driver), name, str(threads)]
    done = subprocess.run(command, input=memory.message(), capture_output=True)
    assert done.returncode == 0, (done.returncode, done.stderr.decode())
    memory.take(done.stdout)


def _array(kind: Any, address: int, count: int) -> c.Array:
    return (kind * count).from_address(address)


class Kernels(simt_library.Emulated):
    """The layer's kernels, called as ``Emulated`` calls the CUDA emulator's."""

    def __init__(self, driver: Path, threads: int = 1, saves: bool = True, prepacked: bool = False):
        super().__init__(None, saves=saves)
        self.driver, self.threads, self.prepacked = driver, threads, prepacked
        self.batch_sizes: list[Tensor] = []

    def lstm(self, input: Any, state: Any, weights: Any, stack: Any, call: Any) -> Any:
        self.batch_sizes = [] if call.batch_sizes is None else [call.batch_sizes]
        return super().lstm(input, state, weights, stack, call)

    def call(self, name: str, args: c.Structure, tensors: Sequence[Tensor]) -> None:
        name = name.removeprefix("simt_")
        p = args.problem
        cells = p.layers * p.directions
        arrays = [_array(simt_library._Weights, p.weights, cells)]
        if name == "backward":
            arrays.append(_array(simt_library._Weights, args.grads, cells))
        elif self.prepacked:
            name = "prepacked"
        run(self.driver, name, self.threads, args, arrays, [*tensors, *self.batch_sizes])


class Texts(simt_text.Writer):
    """The kernels that draw text, from weights packed in words."""

    def __init__(self, driver: Path, threads: int = 1):
        super().__init__(None)
        self.driver, self.threads = driver, threads
        self.weights: list[Tensor] = []

    def text(self, packed: Any, prime: Any, length: Any, hx: Any, how: Any, offset: int = 0) -> Any:
        parts = {
            name: [x.contiguous() for x in getattr(packed, name)]
            for name in ("matrices", "biases", "scales")
        }
        packed = replace(packed, table=packed.table.contiguous(), **parts)
        self.weights = [packed.table, *parts["matrices"], *parts["biases"], *parts["scales"]]
        self.weights += [how.seed] if how.seed is not None else []
        return super().text(packed, prime, length, hx, how, offset)

    def _run(self, call: c.Structure, tensors: Sequence[Tensor]) -> None:
        layers = _array(simt_text._Layer, call.weights, call.layers)
        run(self.driver, "generate", self.threads, call, [layers], [*tensors, *self.weights])


def activations(driver: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid and tanh of every element."""
    sigmoid, tanh = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    call = Activations(
        DTYPES.index(x.dtype), x.numel(), x.data_ptr(), sigmoid.data_ptr(), tanh.data_ptr()
    )
    run(driver, "activations", 1, call, [], [x, sigmoid, tanh])
    return sigmoid, tanh
