"""The kernels of AVX-512 and AMX on processors without them.

They are compiled with 64-byte vectors for the instructions that this processor has, and products of
bfloat16 pairs and of tiles are emulated. So everything is tested that runs on AVX-512, AVX-512-BF16
and AMX, except the compiler's choice of instructions.
"""

import ctypes
import platform
import shutil
import subprocess

import pytest
import torch
from simt_library import ROOT, Emulated

from benchmarks.problems import NORMED, OPTIONS, Problem, make, outputs_and_gradients, tolerance
from fastlstm import reference

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# The type and what csrc/cpu/isa/*/*.cpp of the set define.
KERNELS = {
    "float": (torch.float32, "float", []),
    "pairs": (torch.bfloat16, "BFloat16", ["-DFASTLSTM_BF16_PAIRS=1"]),
    "tiles": (torch.bfloat16, "BFloat16", ["-DFASTLSTM_BF16_PAIRS=1", "-DFASTLSTM_AMX=1"]),
}
every_kernel = pytest.mark.parametrize("kernels", KERNELS)


class _Options(ctypes.Structure):
    _fields_ = [("threads", ctypes.c_int32)]


class _Report(ctypes.Structure):
    _fields_ = [("error", ctypes.c_char * 512)]


class Wide(Emulated):
    """Calls the library's functions as ``Emulated`` calls the CUDA emulator's."""

    def __init__(self, library, threads):
        super().__init__(library)
        self.threads = threads

    def call(self, name, args, tensors):
        report = _Report()
        run = getattr(self.library, name.replace("simt_", "wide_"))
        run(ctypes.byref(args), ctypes.byref(_Options(self.threads)), ctypes.byref(report))
        assert not report.error, report.error.decode()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Built side by side."""
    folder, flags = tmp_path_factory.mktemp("wide"), []
    if platform.machine().lower() in ("x86_64", "amd64") and _has_avx2():
        flags = ["-mavx2", "-mfma"]
    running = {}
    for name, (_, storage, defines) in KERNELS.items():
        command = [
            "g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-psabi", *flags,
            f"-I{ROOT / 'csrc'}", f"-DSTORAGE={storage}", *defines,
            str(ROOT / "tests/ops/wide/kernels.cpp"), str(ROOT / "csrc/scratch.cpp"),
            "-o", str(folder / f"{name}.so"),
        ]  # fmt: skip
        running[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    built = {}
    for name, process in running.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        built[name] = ctypes.CDLL(str(folder / f"{name}.so"))
    return built


def _has_avx2():
    from fastlstm import _C

    return "avx2" in _C.cpu_supported()


def check(library, p, threads):
    x = make(p)
    actual = outputs_and_gradients(Wide(library, threads).lstm, x)
    expected = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    for ours, theirs in zip(actual, expected, strict=True):
        floor = 1e-2 * max(b.norm() for b in theirs)  # see TOLERANCE
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            error = (a.double() - b).norm() / torch.maximum(b.norm(), floor).clamp_min(1e-6)
            assert error < tolerance(p), f"{j} of {p}: relative error {error:.2e}"
    return [*actual[0], *actual[1]]


@every_kernel
@pytest.mark.parametrize("name", OPTIONS | NORMED)
def test_wide_kernels_match_the_reference(name, kernels, libraries):
    check(
        libraries[kernels],
        Problem(dtype=KERNELS[kernels][0], **(OPTIONS | NORMED)[name]),
        threads=2,
    )


@every_kernel
@pytest.mark.parametrize("batch", [1, 7, 17, 50])
@pytest.mark.parametrize("hidden", [1, 3, 31, 33, 129])
def test_wide_kernels_at_odd_sizes(hidden, batch, kernels, libraries):
    p = Problem(
        hidden_size=hidden, input_size=hidden + 2, batch=batch, steps=11, dtype=KERNELS[kernels][0]
    )
    check(libraries[kernels], p, threads=2)


@every_kernel
@pytest.mark.parametrize("batch", [3, 7, 16])
@pytest.mark.parametrize("hidden", [1, 31, 129])
def test_wide_kernels_at_one_step(hidden, batch, kernels, libraries):
    p = Problem(
        hidden_size=hidden, input_size=hidden + 2, batch=batch, steps=1, dtype=KERNELS[kernels][0]
    )
    check(libraries[kernels], p, threads=2)


@every_kernel
def test_wide_kernels_and_the_gradient_of_all_cells(kernels, libraries):
    check(
        libraries[kernels], Problem(dtype=KERNELS[kernels][0], num_layers=2, cells=True), threads=2
    )


@every_kernel
def test_wide_kernels_keep_an_infinite_input_out_of_the_padding(kernels, libraries):
    x = make(Problem(hidden_size=31, proj_size=5, num_layers=2, dtype=KERNELS[kernels][0]))
    with torch.no_grad():
        x.input[0, 0, 0] = torch.inf
    outputs, _ = outputs_and_gradients(Wide(libraries[kernels], threads=2).lstm, x)
    expected, _ = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    for a, b in zip(outputs, expected, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.02)


@every_kernel
def test_wide_kernels_do_not_depend_on_the_threads(kernels, libraries):
    """Teams of one to five, and parts of the batch, in both directions."""
    p = Problem(
        hidden_size=150, input_size=40, batch=5, steps=12, num_layers=2, bidirectional=True,
        proj_size=35, packed=True, dtype=KERNELS[kernels][0],
    )  # fmt: skip
    first, *others = (check(libraries[kernels], p, threads) for threads in (1, 2, 3, 6))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
