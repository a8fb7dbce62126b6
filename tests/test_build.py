"""What setup.py builds on processors other than this one."""

import platform
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
