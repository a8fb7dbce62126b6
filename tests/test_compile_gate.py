"""Every .cu compiles alone with nvcc, for every architecture, without warnings or spills.

Nothing here runs on a GPU. What ptxas reports (registers, spills, shared memory) is held against
what the planner and the launcher assume.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastlstm import _C
from fastlstm.algorithms import GPUS

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
            assert len(own) == 18, f"{source} {architecture}: three tiles of six products"


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
def test_steps_use_tensor_cores_where_meant(source, instruction, compiled):
    _, ptx, _ = compiled[source]
    entries = re.split(r"\.entry\s+", ptx)[1:]
    steps = [text for text in entries if "step_kernel" in text.split("(")[0]]
    assert len(steps) == 18
    for text in steps:
        assert ("mma.sync" in text) == (instruction is not None)
        assert instruction is None or instruction in text
        assert "cp.async.cg" in text


@pytest.mark.parametrize(
    ("source", "instruction"),
    [
        ("persistent_bf16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("persistent_f16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        ("persistent_tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ],
)
def test_persistent_kernels_hold_what_they_are_made_of(source, instruction, compiled):
    _, ptx, _ = compiled[source]
    entries = re.split(r"\.entry\s+", ptx)[1:]
    kernels = [text for text in entries if "persistent" in text.split("(")[0]]
    assert len(kernels) == 7 + 6  # forward and backward
    for text in kernels:
        assert instruction in text
        assert "ld.acquire.gpu" in text
        assert "st.release.gpu" in text
        assert "globaltimer" in text, "a wait without an end"
        assert not re.search(r"\b(atom|red)\.", text), "sums would depend on the order of arrival"


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "B200"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("dtype", "hidden", "layers", "directions", "batch"),
    [
        (2, 512, 2, 1, 100),
        (2, 1024, 1, 1, 64),
        (3, 256, 1, 1, 16),
        (3, 768, 1, 1, 16),
        (0, 512, 2, 1, 100),
        (2, 512, 3, 2, 32),
        (2, 40, 8, 1, 7),
        (2, 256, 2, 1, 16),
        (2, 257, 3, 1, 129),
        (2, 1024, 1, 1, 512),
    ],
)
def test_persistent_grids_fit_the_gpu(dtype, hidden, layers, directions, batch, gpu, backward):
    """A cooperative grid must be resident at once: one CTA an SM, by shared memory and registers.

    Counted here anew: what a CTA holds is 4 * units rows of K, padded to 512 bytes, for one source
    or two, and the partial sums of its blocks of cells, at most eight at a time.
    """
    capability, sms, shared = GPUS[gpu]
    plan = _C.plan(
        dtype=dtype, steps=100, batch=batch, packed=False, hidden_size=hidden, proj_size=0,
        layers=layers, directions=directions, backward=backward, capability=capability, sms=sms,
        shared_per_block=shared, algorithm=0, allow_tf32=True,
    )  # fmt: skip
    if plan["algorithm"] != "persistent":
        assert plan["reason"] in (
            "the weights do not fit the GPU's shared memory",
            "its steps are estimated to be the faster ones",
        )
        return
    size, units, tiles = 4 if dtype == 0 else 2, plan["units"], plan["tiles"]
    quarter = math.ceil(math.ceil(hidden / 4) / units) * units
    depth = math.ceil((4 * quarter if backward else hidden) * size / 512) * 512
    slots = 4 * quarter // units if backward else math.ceil(hidden / units)
    assert plan["wave"] == 1 or directions == 1
    assert slots * plan["active"] * plan["wave"] * directions <= sms
    assert plan["groups"] * 8 * tiles >= batch
    partial = 8 * min(8, units // 8 * tiles) * 1024
    assert partial + min(plan["wave"], 2) * 4 * units * depth <= shared


def test_persistent_kernels_have_the_registers_of_an_sm(kernels):
    found = [k for k in kernels if "persistent_" in k.name]
    assert len(found) == 3 * 13 * len(ARCHITECTURES)
    assert all(256 * k.registers <= REGISTERS_OF_AN_SM for k in found)
