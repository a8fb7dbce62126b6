"""What is asked of a GPU, and of kernels on it: the code meets a CUDA runtime of our own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastlstm.ops import native

ROOT = Path(__file__).parents[2]
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if NVCC is None:
        pytest.skip("no nvcc on PATH")
    program = tmp_path_factory.mktemp("gpu") / "properties"
    csrc = ROOT / "csrc"
    sources = [csrc / "cuda" / "device_properties.cu", Path(__file__).with_name("gpu_stub.cpp")]
    words = [str(NVCC), "-std=c++17", "-O0", "-cudart", "none", "-arch=sm_80"]
    words += [f"-I{csrc}", f"-I{csrc / 'cuda'}", *map(str, sources), "-o", str(program)]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return program


def said(program, *words):
    found = subprocess.run(
        [str(program), *map(str, words)], capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()


@pytest.mark.parametrize(
    ("gpu", "code", "driver", "capability", "shared", "early"),
    [
        ("9 0", 90, 13000, 90, 227, True),
        ("10 3", 100, 13000, 100, 227, True),  # by PTX for 10.0
        ("9 0", 80, 13000, 80, 227, False),  # built for 8.0+PTX
        ("9 0", 75, 13000, 75, 64, False),
        ("8 0", 75, 13000, 75, 64, False),
        ("8 6", 80, 12060, 80, 227, False),
        ("9 0", 90, 12020, 90, 227, False),  # whose graphs hold no launch that begins early
    ],
)
def test_a_gpu_counts_as_what_its_code_was_compiled_for(
    program, gpu, code, driver, capability, shared, early
):
    """Kernels that need more do nothing in code that the driver compiled from older PTX."""
    found = said(program, "gpu", *gpu.split(), code, driver, 16)
    assert found == [f"{capability} {shared << 10} {int(early)} 16"]


@pytest.mark.parametrize("largest", [1, 2, 8, 16])
def test_the_planner_knows_the_largest_cluster_of_a_gpu(program, largest):
    assert said(program, "gpu", 9, 0, 90, 13000, largest) == [f"90 {227 << 10} 1 {largest}"]


def test_no_launch_takes_back_shared_memory_that_another_thread_is_about_to_use(program):
    """A kernel has one bound, of all threads, on each GPU: it grows, and 48 KiB need none."""
    launches = [(0, "a", 100_000), (0, "a", 60_000), (0, "b", 49_152), (0, "b", 60_000)]
    launches += [(1, "a", 70_000), (0, "a", 200_000), (1, "a", 70_000)]
    found = said(program, "shared", *(word for launch in launches for word in launch))
    assert found == ["0 a 100000", "0 b 60000", "1 a 70000", "0 a 200000"]


def test_waits_outlast_what_may_hold_a_gpu(program, monkeypatch):
    """NCCL's kernels do, for as long as another process takes: by default up to ten minutes."""
    monkeypatch.delenv("FASTLSTM_WAIT_SECONDS", raising=False)
    assert int(said(program, "wait")[0]) > 10 * 60 * 10**9
    monkeypatch.setenv("FASTLSTM_WAIT_SECONDS", "0.5")
    assert said(program, "wait") == ["500000000"]


@pytest.mark.cuda
def test_the_planner_knows_this_gpu_as_torch_does():
    p = torch.cuda.get_device_properties("cuda")
    capability, sms, shared, cluster = native.gpu_sizes(torch.device("cuda"))
    assert sms == p.multi_processor_count
    if f"{p.major}.{p.minor}" in str(native.cuda_architectures()):  # else it runs PTX
        assert (capability, shared) == (10 * p.major + p.minor, p.shared_memory_per_block_optin)
    assert cluster in ((2, 4, 8, 16) if capability >= 90 else (16,))
