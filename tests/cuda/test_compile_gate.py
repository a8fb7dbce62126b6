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
import sass
from setuptools import Extension
from torches import WITH_CUDA, symbols, unpacked

import setup as build
from fastlstm import _C
from fastlstm.algorithms import GPUS

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
ARCHITECTURES = ["sm_75", "sm_80", "sm_90a", "sm_100a"]
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


STEP_KERNEL = "11step_kernel"  # mangled, which tells it from single_step_kernel
WIDE_KERNEL = "16wide_step_kernel"

# Their CTAs exchange data in every step: nothing may stand in their loops that waits for all memory
# or drops the L1 cache.
EXCHANGING = [s.stem for s in SOURCES if s.stem.startswith(("cluster_", "grid_", "generate_"))]


def has_code_for_one_gpu_alone(source: Path) -> bool:
    """Whether its kernels differ between sm_100a and the PTX for newer GPUs: by setmaxnreg."""
    headers = (ROOT / "csrc" / "cuda" / source.stem.split("_")[0]).glob("*.cuh")
    words = re.compile(r"\b(raise|lower)_registers<|\bFASTLSTM_MOVES_REGISTERS\b")
    return any(words.search(path.read_text()) for path in headers)


def compile_one(source: Path, folder: Path) -> tuple[str, str, int]:
    """Compile for all architectures; returns messages, PTX of sm_90a and the exit status.

    PTX for newer GPUs is made where it is not that of sm_100a again.

    The machine code for sm_90a and the object stay in ``folder / source.stem``.
    """
    keep = folder / source.stem
    keep.mkdir()
    targets = [f"arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    if has_code_for_one_gpu_alone(source):
        targets.append("arch=compute_100,code=compute_100")
    found = subprocess.run(
        [
            # -O is the host's, whose code is compiled for its warnings and symbols.
            *(str(NVCC), "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}"),
            *(word for target in targets for word in ("-gencode", target)),
            *("-Xptxas", "-v", "-Werror", "all-warnings"),
            *("-Xcompiler", "-Wall,-Wextra,-fPIC,-fvisibility=hidden"),
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
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def compiled(folder):
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


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_ptx_for_newer_gpus_is_that_of_sm_100a_or_compiled_too(source, compiled, folder):
    """What depends on a single GPU asks for a macro, and holds setmaxnreg."""
    found = {
        path.name.split(".")[1]: path.read_text() for path in (folder / source.stem).glob("*.ptx")
    }
    assert {"compute_75", "compute_80", "compute_90a", "compute_100a"} <= found.keys()
    assert ("setmaxnreg" in found["compute_100a"]) <= ("compute_100" in found)
    headers = (ROOT / "csrc" / "cuda").rglob("*.*h")
    asked = [path.name for path in headers if "_ARCH_FEAT_" in path.read_text()]
    assert asked == ["exchange.cuh"]


def test_report_covers_every_kernel_and_architecture(kernels):
    steps = [k for k in kernels if STEP_KERNEL in k.name]
    stepwise = [s.stem for s in SOURCES if s.stem.startswith("stepwise")]
    assert len(stepwise) == 5
    for source in stepwise:
        for architecture in ARCHITECTURES:
            own = [k for k in steps if (k.source, k.architecture) == (source, architecture)]
            assert len(own) == 18, f"{source} {architecture}: three tiles of six products"


def test_no_kernel_spills(kernels):
    """None on sm_90a and sm_75, none of stepwise anywhere.

    Of those that hold weights in registers, a few do by some bytes where no such GPU has run them.
    """
    spilling = [k for k in kernels if k.spilled or k.stack]
    slightly = [
        k
        for k in spilling
        if k.architecture in ("sm_80", "sm_100a")
        and k.source.startswith(("cluster_", "grid_"))
        and k.spilled < 256
    ]
    assert len(slightly) <= 8
    assert spilling == slightly, "\n".join(str(k) for k in spilling if k not in slightly)


def test_registers_let_as_many_blocks_run_as_shared_memory_does(kernels):
    """Tiles by tile.cuh's numbers: 128 threads a block, and four (tile 0) or three blocks an SM."""
    for k in kernels:
        if STEP_KERNEL not in k.name:
            continue
        shape = re.search(r"Lb[01]ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", k.name)
        assert shape, k.name
        frags, rows, columns, split = map(int, shape.groups())
        threads = 32 * rows * columns * split
        three = 16 * frags * rows > 16 or k.source == "stepwise_f64"
        blocks = 1 if threads >= 256 else 3 if three else 4
        assert threads * k.registers * blocks <= REGISTERS_OF_AN_SM, k


def test_wide_steps_hold_their_sums_and_leave_room_for_other_ctas(kernels):
    """Of 256 threads each; the first tile runs twice on an SM."""
    wide = [k for k in kernels if WIDE_KERNEL in k.name and k.architecture in ("sm_90a", "sm_100a")]
    assert len(wide) == 2 * 2 * 3, "two architectures, two types, three tiles"
    for k in wide:
        ctas = 2 if re.search(r"WideShapeI\w+?Li0E", k.name) else 1
        assert 256 * k.registers * ctas <= REGISTERS_OF_AN_SM, k


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
    steps = [text for text in entries if STEP_KERNEL in text.split("(")[0]]
    assert len(steps) == 18
    for text in steps:
        assert ("mma.sync" in text) == (instruction is not None)
        assert instruction is None or instruction in text
        assert "cp.async.cg" in text


@pytest.mark.parametrize("source", [s for s in EXCHANGING if not s.startswith("generate_")])
def test_kernels_that_exchange_hold_what_they_are_made_of(source, compiled):
    """Tensor cores or, in fp32, multiply-adds; waits that end, and no sum that depends on the order
    of arrival."""
    algorithm, _, kind = source.split("_")
    shape = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}.get(kind)
    _, ptx, _ = compiled[source]
    entries = re.split(r"\.entry\s+", ptx)[1:]
    kernels = [text for text in entries if f"{algorithm}_" in text.split("(")[0]]
    assert kernels
    for text in kernels:
        if shape:
            assert f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32" in text
        else:
            assert "mma" not in text
            assert text.count("fma.rn.f32") >= 128
        waits = "mbarrier.try_wait" in text or "ld.relaxed" in text
        assert waits == ("globaltimer" in text), "a wait without an end"
        assert not re.search(r"\b(atom|red)\.", text)


def machine_code(folder, source):
    (cubin,) = (folder / source).glob("*90a*.cubin")
    return sass.disassembled(cubin)


SIGNAL = """
__global__ void signal(unsigned* flag, unsigned* data) {
  for (unsigned step = 1; step < 100; ++step) {
    data[threadIdx.x] = step;
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(flag), "r"(step) : "memory");
    unsigned seen;
    do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(flag + 1) : "memory");
    while (seen < step);
  }
}
"""


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: no machine code was read")
def test_the_reader_of_machine_code_sees_what_waits_in_loops(tmp_path):
    """A release waits for all stores, an acquire drops the L1 cache: in every round of a loop."""
    (tmp_path / "signal.cu").write_text(SIGNAL)
    command = [NVCC, "-arch=sm_90a", "-cubin", "-o", "signal.cubin", "signal.cu"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (lines,) = sass.disassembled(tmp_path / "signal.cubin").values()
    opcodes = {opcode.split(".")[0] for opcode in sass.in_loops(lines)}
    assert {"MEMBAR", "CCTL"} <= opcodes


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: no machine code was read")
@pytest.mark.parametrize("source", EXCHANGING)
def test_no_step_waits_for_all_memory_or_drops_a_cache(source, compiled, folder):
    kernels = machine_code(folder, source)
    algorithm = source.split("_")[0]
    steps = {name: sass.in_loops(lines) for name, lines in kernels.items() if algorithm in name}
    assert steps
    for name, opcodes in steps.items():
        assert any(opcode.startswith("HMMA") for opcode in opcodes) or source.endswith("_f32"), name
        bad = {o for o in opcodes if o.startswith(("MEMBAR", "CCTL", "LDL", "STL"))}
        assert not bad, (name, bad)


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: no machine code was read")
@pytest.mark.parametrize("source", ["stepwise_bf16", "stepwise_f16"])
def test_stages_of_a_wide_step_are_copies_and_products(source, compiled, folder):
    """Two bulk copies, and nothing that waits for all memory or that mma's registers cost."""
    code = machine_code(folder, source)
    wide = {name: sass.in_loops(lines) for name, lines in code.items() if WIDE_KERNEL in name}
    assert len(wide) == 3
    for name, opcodes in wide.items():
        kinds = [opcode.split(".")[0] for opcode in opcodes]
        assert kinds.count("HMMA") in (16, 32), name
        assert kinds.count("UBLKCP") >= 2, name
        assert not {"MEMBAR", "CCTL", "LDL", "STL"} & set(kinds), name
        assert kinds.count("LDS") <= kinds.count("HMMA") // 2, name


STEPS = [s.stem for s in SOURCES if s.stem.startswith("stepwise")]


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: no machine code was read")
@pytest.mark.parametrize("source", STEPS)
def test_steps_copy_weights_and_then_wait_for_the_step_before(source, compiled, folder):
    """ACQBULK waits for the kernel before, PREEXIT lets the next one begin."""
    kernels = machine_code(folder, source)
    tiles = {name for name in kernels if STEP_KERNEL in name}
    single = {name for name in kernels if "single_step" in name}
    wide = {name for name in kernels if WIDE_KERNEL in name}
    early = (
        tiles
        | single
        | wide
        | {n for n in kernels if re.search("finish_kernel|norm_(for|back)ward", n)}
    )
    for name, lines in kernels.items():
        opcodes = [opcode.split(".")[0] for opcode in sass.opcodes_of(lines)]
        found = (opcodes.count("ACQBULK"), opcodes.count("PREEXIT"))
        assert found == ((1, 1) if name in early else (0, 0)), name
        if name not in early:
            continue
        wait, trigger = opcodes.index("ACQBULK"), opcodes.index("PREEXIT")
        before = opcodes[:wait]
        assert (trigger < wait) == (name in single), name
        if name in tiles:
            # 16 bytes each: a cell's code stands once for neighbouring cells and once for any, not
            # for each of a thread's sums, and an SM's instruction cache of 128 KB holds it.
            assert len(opcodes) < 6000, name
            # three stages before the wait, of three and more copies each
            assert before.count("LDGSTS") >= 9, name
            assert not {"HMMA", "BAR", "STG"} & set(before), name
        elif name in wide:  # W's first stages, and the input part
            assert {"UBLKCP", "LDG"} <= set(before), name
            assert not {"HMMA", "STG"} & set(before), name
        elif name in single:  # half of the product
            assert "CCTL" in before, name
            assert before.count("LDG") > 8, name
            assert "STG" not in before, name
        else:
            assert not {"LDG", "STG"} & set(before), name


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "B200"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("dtype", "hidden", "directions", "batch"),
    [
        (2, 512, 1, 100),
        (2, 1024, 1, 64),
        (3, 256, 1, 16),
        (3, 768, 1, 16),
        (2, 600, 2, 70),
        (0, 512, 1, 100),
        (2, 512, 2, 32),
        (2, 40, 1, 7),
        (2, 257, 1, 129),
        (2, 1024, 1, 512),
    ],
)
def test_groups_of_ctas_hold_the_layer_and_fit_the_gpu(
    dtype, hidden, directions, batch, gpu, backward
):
    capability, sms, shared = GPUS[gpu]
    plan = _C.plan(
        dtype=dtype, steps=100, batch=batch, packed=False, hidden_size=hidden, proj_size=0,
        layers=1, directions=directions, backward=backward, capability=capability, sms=sms,
        shared_per_block=shared, algorithm=0, allow_tf32=True,
    )  # fmt: skip
    if plan["algorithm"] == "stepwise":
        assert "ctas" not in plan
        return
    assert plan["ctas"] * plan["units"] >= hidden
    assert plan["ctas"] <= (16 if plan["algorithm"] == "cluster" else sms)
    assert plan["sequences"] % (4 if plan["ctas"] == 1 else 8) == 0
    assert capability >= 90 or plan["algorithm"] == "grid"


def test_kernels_that_exchange_have_the_registers_of_an_sm(kernels):
    exchanging = [k for k in kernels if "cluster_" in k.name or "grid_" in k.name]
    assert exchanging
    for k in exchanging:
        threads = 512 if "Li48E" in k.name else 384 if "cluster_" in k.name else 256
        assert threads * k.registers <= REGISTERS_OF_AN_SM, k


@pytest.fixture(scope="module")
def module(compiled, folder, tmp_path_factory):
    """The CUDA module, built against a torch of PyPI's with the objects that are there."""
    ninja_file = build.ninja_file
    copy = f"  command = cp {folder}/$$(basename $out .o)/out.o $out"

    def with_objects(*arguments):
        return re.sub(r"(?<=rule nvcc\n).*", lambda _: copy, ninja_file(*arguments))

    work = tmp_path_factory.mktemp("module")
    target = work / "_C_cuda.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ninja_file", with_objects)
        extension = Extension("fastlstm._C_cuda", build.cuda_sources())
        build.build_module(extension, unpacked(WITH_CUDA), work, target)
    return target


def test_the_module_is_linked_and_needs_only_what_torch_has(module):
    libraries = unpacked(WITH_CUDA) / "lib"
    offered = {symbol for path in libraries.glob("*.so") for _, symbol in symbols(path)}
    wanted = symbols(module, "--undefined-only")
    of_torch = {s for kind, s in wanted if kind == "U" and s.startswith(("aoti_", "torch_"))}
    assert "aoti_torch_get_current_cuda_stream" in of_torch
    assert of_torch <= offered
    # CUDA's runtime is linked statically: no symbol of it is left to be found at load.
    assert not {s for kind, s in wanted if s.startswith("cuda")}
    assert {s for _, s in symbols(module, "--defined-only")} == {"PyInit__C_cuda"}
