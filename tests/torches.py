"""Headers and libraries of torch's releases, out of their wheels, for builds against them."""

import json
import platform
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "torches"
LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
CUDA_LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so")  # most of what a wheel holds
SECONDS = 600
WITH_CUDA = "2.11.0"  # the release against which the CUDA module is linked


def pip(*arguments):
    """What pip prints. Skips the test where it cannot get what it is asked for."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip {arguments[0]} did not end in {SECONDS} s")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"pip {arguments[0]} cannot get a torch of PyPI's: {reason}")
    return done.stdout


@cache
def newest():
    """The version that pip would install today."""
    arguments = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-"]
    report = json.loads(pip("install", *arguments, "torch"))
    return report["install"][0]["metadata"]["version"]


@cache
def unpacked(version):
    """The folder ``torch`` of a release, without its Python, kept for next time.

    The wheels of PyPI for Linux are built with CUDA; none of what they depend on is fetched.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the wheels looked into are those for Linux on x86-64")
    folder = FOLDER / version
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        wheels = FOLDER / f"{version}.wheel"
        pip("download", "--quiet", "--no-deps", "--dest", str(wheels), f"torch=={version}")
        half_done = FOLDER / f"{version}.tmp"
        for path in wheels.iterdir():
            libraries = LIBRARIES + (CUDA_LIBRARIES if version == WITH_CUDA else ())
            with zipfile.ZipFile(path) as wheel:
                names = [name for name in wheel.namelist() if is_needed(name, libraries)]
                wheel.extractall(half_done, names)
            path.unlink()
        wheels.rmdir()
        half_done.rename(folder)
    return folder / "torch"


def is_needed(name, libraries):
    top, _, rest = name.partition("/")
    kind, _, file = rest.partition("/")
    return top == "torch" and (kind in ("include", "version.py") or file in libraries)


def symbols(path, *options):
    """Kinds and names, as nm prints them."""
    command = ["nm", "-D", *options, str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {tuple(line.split("@")[0].split()[-2:]) for line in lines}
