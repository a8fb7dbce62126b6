"""What setup.py builds on processors other than this one, and what it makes of its surroundings."""

import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from setuptools import Extension

import setup as build

X86 = ["x86_64", "AMD64"]
OTHERS = ["aarch64", "arm64", "riscv64", "ppc64le"]


def instruction_sets():
    paths = [Path(source) for source in build.cpu_sources()]
    return {path.parent.name for path in paths if path.parent.parent.name == "isa"}


def ninja_file(tmp_path):
    torch_folder = build.find_torch()
    assert torch_folder is not None
    module = Extension("fastlstm._C", build.cpu_sources())
    return build.ninja_file(module, torch_folder, tmp_path / "module.so")


@pytest.mark.parametrize("machine", X86)
def test_x86_has_every_instruction_set(machine, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert instruction_sets() == {"baseline", *build.INSTRUCTION_SETS}


@pytest.mark.parametrize("machine", OTHERS)
def test_other_processors_have_the_baseline_with_all_types(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert instruction_sets() == {"baseline"}
    kernels = [name for name in build.cpu_sources() if "/isa/" in name]
    assert {Path(name).stem for name in kernels} == {"f32", "f64", "bf16", "f16", "generate"}
    shared = {name for name in build.cpu_sources() if name not in kernels}
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert shared == {name for name in build.cpu_sources() if "/isa/" not in name}


@pytest.mark.parametrize("machine", OTHERS)
def test_other_processors_compilers_get_no_flag_of_x86(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "understands", lambda *a: pytest.fail(f"asked about {a}"))
    text = ninja_file(tmp_path)
    assert "cpu/isa/baseline/f32.o" in text
    assert not [word for word in text.split() if word.startswith(("-mavx", "-mamx", "-mfma"))]
    assert "FASTLSTM_NO_" not in text


def test_x86s_compilers_are_asked_for_the_young_instruction_sets(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "understands", lambda compiler, flags: "-mamx-tile" not in flags)
    text = ninja_file(tmp_path)
    assert "-DFASTLSTM_NO_AMX" in text
    assert "-DFASTLSTM_NO_AVX512DOT" not in text
    assert "cpu/isa/amx" not in text
    assert "cpu/isa/avx512dot/bf16.o" in text


@pytest.mark.parametrize(("machine", "folder"), [("x86_64", "x86_64"), ("aarch64", "sbsa")])
def test_cudas_libraries_are_looked_for_where_its_toolkit_has_them(machine, folder, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "find_cuda", lambda: Path("/cuda"))
    link = next(line for line in build.cuda_lines("c++") if line.startswith("link = "))
    assert f"-L/cuda/targets/{folder}-linux/lib" in link


@pytest.fixture
def places(monkeypatch, tmp_path):
    """The folders of packages in which an isolated build has to look, none of them in sys.path."""
    own, base = str(tmp_path / "own"), str(tmp_path / "base")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "base_prefix", "below")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": own, "platlib": own})
    monkeypatch.setattr(site, "PREFIXES", [sys.prefix, "below"])
    monkeypatch.setattr(site, "getsitepackages", lambda: [own, base])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    return tmp_path


def install_torch(folder, version):
    (folder / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\n")


@pytest.mark.parametrize("place", ["own", "base", "user"])
def test_torch_is_found_in_the_environment_below_it_and_where_the_user_has_it(place, places):
    assert build.find_torch() is None
    install_torch(places / place, "2.13.0+cpu")
    assert build.find_torch() == places / place / "torch"


def test_a_users_torch_is_not_found_from_an_environment_that_is_closed_to_it(places, monkeypatch):
    install_torch(places / "user", "2.13.0")
    monkeypatch.setattr(site, "PREFIXES", [sys.prefix])
    assert build.find_torch() is None


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0", "unknown"])
def test_a_torch_that_is_too_old_counts_as_none(version, places):
    install_torch(places / "own", version)
    assert build.find_torch() is None
    install_torch(places / "base", "2.10.0a0+git123")
    assert build.find_torch() == places / "base" / "torch"


def test_a_compiler_that_is_asked_for_is_taken_or_missed_aloud(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "g++" else None)
    monkeypatch.setenv("CXX", "g++ -m64")
    assert build.find_compiler() == "g++ -m64"
    monkeypatch.setenv("CXX", "clang++ -m64")
    words = "CXX: expected a compiler's command, got 'clang++ -m64', not found"
    with pytest.raises(SystemExit, match=re.escape(words)):
        build.find_compiler()
    monkeypatch.setenv("CXX", "")
    assert build.find_compiler() == "g++"


def test_a_compiler_behind_a_cache_is_cached_once_and_is_nvccs(monkeypatch):
    monkeypatch.setattr(build, "find_cuda", lambda: Path("/cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.delenv("FASTLSTM_CCACHE", raising=False)
    assert build.compiler_cache(["/opt/sccache", "g++"]) == ""
    assert build.compiler_cache(["g++"]) == "/bin/ccache "
    nvcc = next(line for line in build.cuda_lines("ccache g++ -m64") if line.startswith("nvcc = "))
    assert "-ccbin g++ " in nvcc


@pytest.mark.parametrize(("jobs", "expected"), [("3", 3), ("0", 1)])
def test_max_jobs_says_how_many_compilers_run_at_once(jobs, expected, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", jobs)
    assert build.jobs() == expected


def test_max_jobs_is_a_number(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "two")
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a number, got 'two'"):
        build.jobs()
    monkeypatch.setenv("MAX_JOBS", "")
    assert build.jobs() >= 1


@pytest.mark.parametrize(
    "names", ["8.6;9.0a+PTX", "8.6 9.0a+PTX", " 8.6, 9.0a+PTX;", "8.6;;9.0a+PTX"]
)
def test_gpus_are_named_with_any_separators(names, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
    assert build.cuda_architectures() == "8.6;9.0a+PTX"
    targets = [word for word in build.cuda_targets() if word != "-gencode"]
    assert targets == [
        "arch=compute_86,code=sm_86",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=compute_90",
    ]


def test_no_gpu_named_means_all(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ;")
    assert build.cuda_architectures() == build.CUDA_ARCHITECTURES


@pytest.mark.parametrize("names", ["Hopper", "90a", "9.0A"])
def test_gpus_are_named_by_numbers(names, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{names}")
    with pytest.raises(SystemExit, match=f"expected numbers such as 9.0a, got '{names}'"):
        build.cuda_targets()


def test_a_source_folder_that_was_never_built_says_so_in_one_line(tmp_path):
    package = Path(build.__file__).parent / "fastlstm"
    shutil.copytree(package, tmp_path / "fastlstm", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "-m", "fastlstm.info"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "fastlstm.info: error: fastlstm's native module is missing or cannot be loaded (No module "
        "named 'fastlstm._C'); build it with `pip install .` in the source folder\n"
    )
