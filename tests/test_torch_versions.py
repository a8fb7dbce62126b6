"""One build serves every supported torch: compiled and linked against releases, run beside one.

The releases come from PyPI, without what they depend on; offline the tests are skipped. The CUDA
module is linked in cuda/test_compile_gate.py, where its kernels are compiled.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from setuptools import Extension
from torches import WITH_CUDA, newest, symbols, unpacked

import setup as build

ROOT = Path(__file__).parents[1]
FLOOR = "2.10.0"
RELEASES = [FLOOR, WITH_CUDA, "newest"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="symbols are read with nm")


def release(name):
    return unpacked(newest() if name == "newest" else name)


def compile_module(name, sources, torch_folder, folder):
    """The module of a build in ``folder``, which begins with this tree's objects of kernels."""
    made = next(ROOT.glob(f"build/temp*/{name}"), None)
    if made is not None and not folder.exists():
        shutil.copytree(made, folder)
    target = folder / f"{name.split('.')[-1]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    build.build_module(Extension(name, sources), torch_folder, folder, target)
    return target


@pytest.fixture(autouse=True)
def quick_units(monkeypatch):
    """What sees headers of torch's and pybind11's is optimised less: it takes half of the time."""
    units = build.unit_flags
    monkeypatch.setattr(
        build, "unit_flags", lambda *a: {unit: [*x, "-O1"] for unit, x in units(*a).items()}
    )


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """Build ``_C`` beside a release, with the headers of pybind11 that the release brings."""
    parent, built = tmp_path_factory.mktemp("releases"), {}

    def make(name):
        if name not in built:
            folder = release(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(build, "pybind11_include", lambda torch: torch / "include")
                built[name] = compile_module(
                    "fastlstm._C", build.cpu_sources(), folder, parent / name
                )
        return built[name]

    return make


def package_of(module, folder):
    """A copy of the package whose native module is this one."""
    shutil.copytree(ROOT / "fastlstm", folder / "fastlstm", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy2(module, folder / "fastlstm")
    return folder


def run_beside(folder, code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", RELEASES)
def test_a_module_built_beside_any_release_runs_beside_this_one(name, module, tmp_path):
    folder = package_of(module(name), tmp_path)
    done = run_beside(folder, (ROOT / "tests" / "agrees.py").read_text())
    assert f"beside torch {torch.__version__}: {folder}" in done.stdout, done.stderr


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_has_what_a_module_built_beside_another_needs(name, module):
    libraries = release(name) / "lib"
    offered = {symbol for path in libraries.glob("*.so") for _, symbol in symbols(path)}
    for other in RELEASES:
        wanted = symbols(module(other), "--undefined-only")
        of_torch = {s for kind, s in wanted if kind == "U" and s.startswith(("aoti_", "torch_"))}
        assert of_torch
        assert of_torch <= offered, f"built beside {other}"


@pytest.mark.parametrize("name", RELEASES)
def test_the_cuda_modules_operators_compile_beside_any_release(name, tmp_path):
    """Without its kernels, which see no header of torch's."""
    if build.find_cuda() is None:
        pytest.skip("no CUDA toolkit")
    module = Extension("fastlstm._C_cuda", build.cuda_sources())
    (tmp_path / "build.ninja").write_text(build.ninja_file(module, release(name), tmp_path / "x"))
    command = [build.find_ninja(), "-C", str(tmp_path), "ops_cuda.o", "cuda/module.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout


@pytest.mark.parametrize("name", RELEASES)
def test_a_module_shows_its_init_function_alone(name, module):
    assert {s for _, s in symbols(module(name), "--defined-only")} == {"PyInit__C"}


RAISES = """
import resource, torch, fastlstm
lstm = fastlstm.LSTM(8, 512)
h = lstm(torch.zeros(2, 3, 8))[0]
sizes = 512, 1, True, 0, False, 0.0, 0.0, 0.0, 0.0, 0.0, False, False, 0, False
too_few = list(lstm.parameters())[:3]
try:
    with torch.no_grad():
        torch.ops.fastlstm.forward(torch.zeros(2, 3, 8), None, None, too_few, None, None, *sizes)
except RuntimeError as error:
    assert "expected 4 weights, got 3" in str(error), error
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    lstm(torch.zeros(10_000, 600, 8))
except RuntimeError as error:
    assert "DefaultCPUAllocator: can't allocate memory" in str(error), error
    print("raised")
torch.testing.assert_close(lstm(torch.zeros(2, 3, 8))[0], h)
"""


def test_errors_with_numbers_survive_a_static_libstdcxx(module, tmp_path, monkeypatch):
    """Where the compiler has libstdc++ as an archive alone, two copies of it are in the process."""
    folder = module(WITH_CUDA).parent
    shared = build.ninja_file
    monkeypatch.setattr(build, "pybind11_include", lambda torch: torch / "include")  # as before
    monkeypatch.setattr(
        build,
        "ninja_file",
        lambda *a: shared(*a).replace("link = -shared", "link = -shared -static-libstdc++"),
    )
    static = tmp_path / "static"
    shutil.copytree(folder, static)
    target = compile_module("fastlstm._C", build.cpu_sources(), release(WITH_CUDA), static)
    assert {s for _, s in symbols(target, "--defined-only")} == {"PyInit__C"}
    libraries = subprocess.run(["ldd", target], capture_output=True, text=True).stdout
    assert "libstdc++" not in libraries
    done = run_beside(package_of(target, tmp_path), RAISES)
    assert (done.returncode, done.stdout) == (0, "raised\n"), done.stderr


def test_torch_is_as_new_as_the_package_says():
    assert tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dependencies = ["torch>=2.10",' in text
    assert build.STABLE_ABI == "0x020a000000000000"
