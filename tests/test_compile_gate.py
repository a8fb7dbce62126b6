"""Every .cu compiles alone with nvcc, for every architecture, without warnings or spills.

Nothing here runs on a GPU. What ptxas reports (registers, spills, shared memory) is held against
what the planner and the launcher assume.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ["sm_75", "sm_80", "sm_90a", "sm_100"]
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="COMPILE GATE NOT RUN: no nvcc on PATH, so no CUDA source was compiled"
)

REGISTERS_OF_AN_SM = 65536


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one entry function."""

    source: str
    name: str
    architecture: str
    stack: int
    spilled: int
    registers: int


def compile_one(source: Path, folder: Path) -> tuple[str, str, int]:
    """Compile for all architectures; returns messages, PTX of sm_90a and the exit status."""
    keep = folder / source.stem
    keep.mkdir()
    targets = [f"arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    targets.append("arch=compute_100,code=compute_100")
    found = subprocess.run(
        [
            *(str(NVCC), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"),
            *(word for target in targets for word in ("-gencode", target)),
            *("-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"),
            *("--keep", "--keep-dir", str(keep)),
            *("-c", str(source), "-o", str(keep / "out.o")),
        ],
        capture_output=True,
        text=True,
    )
    ptx = "".join(path.read_text() for path in keep.glob("*compute_90a*.ptx"))
    if not ptx:
        ptx = next((path.read_text() for path in keep.glob("*.ptx")), "")
    return found.stdout + found.stderr, ptx, found.returncode


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda source: compile_one(source, folder), SOURCES)
        return dict(zip((s.stem for s in SOURCES), results, strict=True))


@pytest.fixture(scope="module")
def kernels(compiled):
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'\n"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers",
        re.S,
    )
    return [
        Kernel(source, m[1], m[2], int(m[3]), int(m[4]) + int(m[5]), int(m[6]))
        for source, (log, _, _) in compiled.items()
        for m in pattern.finditer(log)
    ]


@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_every_source_compiles_alone_without_warnings(source, compiled):
    log, _, status = compiled[source]
    assert status == 0, log
    assert "warning" not in log, log


def test_report_covers_every_kernel_and_architecture(kernels):
    steps = [k for k in kernels if "step_kernel" in k.name]
    stepwise = [s.stem for s in SOURCES if s.stem.startswith("stepwise")]
    assert len(stepwise) == 5
    for source in stepwise:
        for architecture in ARCHITECTURES:
            own = [k for k in steps if (k.source, k.architecture) == (source, architecture)]
            assert len(own) == 12, f"{source} {architecture}: three tiles of four products"


def test_no_kernel_spills(kernels):
    spilling = [k for k in kernels if k.spilled or k.stack]
    assert not spilling, "\n".join(map(str, spilling))


def test_registers_let_as_many_blocks_run_as_shared_memory_does(kernels):
    """Tiles by tile.cuh's numbers: 128 threads a block and four (tile 0) or three blocks an SM."""
    for k in kernels:
        if "step_kernel" not in k.name:
            continue
        shape = re.search(r"Lb[01]ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", k.name)
        assert shape, k.name
        frags, rows, columns, split = map(int, shape.groups())
        threads = 32 * rows * columns * split
        blocks = 1 if threads >= 256 else 3 if 16 * frags * rows > 16 else 4
        assert threads * k.registers * blocks <= REGISTERS_OF_AN_SM, k


@pytest.mark.parametrize(
    ("source", "instruction"),
    [
        ("stepwise_bf16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("stepwise_f16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        ("stepwise_tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
        ("stepwise_f32", None),
        ("stepwise_f64", None),
    ],
)
def test_tensor_cores_where_meant(source, instruction, compiled):
    _, ptx, _ = compiled[source]
    entries = re.split(r"\.entry\s+", ptx)[1:]
    steps = [text for text in entries if "step_kernel" in text.split("(")[0]]
    assert len(steps) == 12
    for text in steps:
        assert ("mma.sync" in text) == (instruction is not None)
        assert instruction is None or instruction in text
        assert "cp.async.cg" in text
