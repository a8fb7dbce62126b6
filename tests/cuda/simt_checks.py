"""How the emulated CUDA kernels are checked: against the reference, for planted bugs, by asan."""

from __future__ import annotations

import ctypes
import functools
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from simt_library import ROOT, Emulated, KernelError, Schedule, load, make
from torch import Tensor

from benchmarks import problems
from benchmarks.problems import Problem
from fastlstm import reference

NEEDED = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("g++") is None, reason="needs make and g++"
)


# A CTA of 256 threads runs a sequence: 200 sequences would be 51,200 threads, and 35 already fill
# more than two tiles of rows. Five sequences of five steps already end at different ones.
_SMALLER = {
    "layer norm, large batch": {"batch": 35},
    "layer norm, every rule": {"batch": 5, "steps": 5},
}
NORMED = problems.NORMED | {name: problems.NORMED[name] | sizes for name, sizes in _SMALLER.items()}


def assert_matches(
    p: Problem, schedule: Schedule, variant: str = "plain", tolerance: float = 0
) -> list[Tensor]:
    """Compare all outputs and gradients; returns them."""
    x = problems.make(p)
    emulated = Emulated(load(variant), schedule)
    found = problems.outputs_and_gradients(emulated.lstm, x)
    expected = problems.outputs_and_gradients(reference.lstm, x.to(torch.float64))
    for kind, ours, theirs in zip(("output", "gradient"), found, expected, strict=True):
        floor = 1e-2 * max(b.norm() for b in theirs)  # see problems.TOLERANCE
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            error = (a.double() - b).norm() / torch.maximum(b.norm(), floor).clamp_min(1e-6)
            assert error < (tolerance or problems.tolerance(p)), (
                f"{kind} {j} of {p}, {schedule}: relative error {error:.2e}"
            )
    assert emulated.races == 0, emulated.first_race
    return [*found[0], *found[1]]


def problems_of(**more: Any) -> Any:
    """A hypothesis strategy for problems of all options."""
    return st.builds(
        Problem,
        input_size=st.integers(1, 40),
        hidden_size=st.integers(5, 40),
        num_layers=st.integers(1, 3),
        batch=st.integers(1, 35),
        steps=st.integers(1, 5),
        has_bias=st.booleans(),
        proj_size=st.integers(0, 4),
        bidirectional=st.booleans(),
        dropout=st.sampled_from([0.0, 0.5]),
        index=st.sampled_from([None, torch.int64]),
        packed=st.booleans(),
        states=st.booleans(),
        random_seed=st.integers(0, 1000),
        **more,
    )


def seen(emulated: Emulated, p: Problem) -> bool:
    """Whether a planted bug shows: as an error, a race or a wrong result."""
    x = problems.make(p)
    expected = problems.outputs_and_gradients(reference.lstm, x.to(torch.float64))
    try:
        found = problems.outputs_and_gradients(emulated.lstm, x)
    except KernelError as error:
        return "is not in this build" not in str(error)
    wrong = any(
        not (a.double() - b).norm() < problems.TOLERANCE[p.dtype] * b.norm()
        for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    )
    return wrong or emulated.races > 0


def shows(library: ctypes.CDLL, problems: Sequence[Problem], schedules: Sequence[Schedule]) -> bool:
    """Whether a library's bug is seen in some problem under some schedule."""
    return any(seen(Emulated(library, s), p) for p in problems for s in schedules)


MISSED = 3  # exit status
_processes = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """The process that children are forked from, with torch imported once for all of them.

    Python before 3.12 does not hand it sys.path, and then imports nothing, without a word.
    """
    _processes.set_forkserver_preload(["simt_checks"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def is_seen(path: Path, module: str, function: str, *arguments: Any) -> bool:
    """Whether a function finds the bug of a planted library, or dies of it.

    It runs in a process of its own, for what a bug reads or writes may be anything.

    Args:
        path: of the library.
        module, function: what is called with the loaded library and ``arguments``.
    """
    _start_server()
    child = _processes.Process(target=_look, args=(str(path), module, function, arguments))
    child.start()
    child.join(600)
    if child.exitcode is None:
        child.kill()
        pytest.fail("ten minutes were not enough")
    assert child.exitcode in (0, MISSED) or child.exitcode < 0, "the test itself failed"
    return child.exitcode != MISSED


def _look(path: str, module: str, function: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    look = getattr(importlib.import_module(module), function)
    sys.exit(0 if look(ctypes.CDLL(path), *arguments) else MISSED)


def plant(
    bugs: dict[str, tuple[str, str, str]],
    folder: Path,
    build: Callable[..., Path] = make,
    types: str = "bf16",
    kinds: str = "",
    only: Sequence[tuple[str, str, str]] = (),
) -> dict[str, Path]:
    """Libraries with one bug each, two builds at a time.

    A bug is a file of csrc/cuda, a text in it and what stands there instead. Only the kernels'
    objects differ from those of the race build.

    Args:
        types, kinds: of the kernels that the libraries hold, as in the Makefile of simt; without
            kinds, every one.
        only: files, statements in them, and the shapes of kernels for which those are compiled:
            the shapes that the tests run. With another one the process ends.
    """
    base = build("race").parent
    includes = {path: path.with_suffix(".d").read_text() for path in base.glob("*.o")}
    of_kinds = tuple(kinds.split()) or ""
    held = {"KINDS": kinds} if kinds else {}

    def one(name: str) -> Path:
        out = folder / name.replace(" ", "_")
        kernels = out / "cuda"
        shutil.copytree(ROOT / "csrc" / "cuda", kernels)

        def change(file: str, text: str, instead: str) -> None:
            whole = (kernels / file).read_text()
            assert whole.count(text) == 1, f"{file} no longer holds the text that {name!r} replaces"
            (kernels / file).write_text(whole.replace(text, instead))

        change(*bugs[name])
        # The others' copies of inline functions do not count: the kernels come first in the link.
        anew = {x for x in includes if f"/{bugs[name][0]}" in includes[x]}
        anew = {x for x in anew if x.stem.startswith(of_kinds)}
        for file, statement, shapes in only:
            if any(f"/{file}" in includes[x] for x in anew):
                change(
                    file, statement, f"if constexpr (!({shapes})) std::_Exit(1); else {statement}"
                )
        for path in includes.keys() - anew:
            (out / path.name).symlink_to(path)
        return build("race", CUDA=str(kernels), OUT=str(out), TYPES=types, **held)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(bugs, pool.map(one, bugs), strict=True))


def sanitize(code: str, right: int, build: Callable[..., Path] = make) -> None:
    """Run code under the address sanitizer; it must print "right:" so many times.

    In a process of its own, with the sanitizer's runtime loaded first.
    """
    build("asan")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{x}.so"], capture_output=True, text=True)
        for x in ("asan", "ubsan")
    ]
    if not all(Path(x.stdout.strip()).is_absolute() for x in runtimes):
        pytest.skip("the compiler has no sanitizer runtime")
    found = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import torch\nfrom simt_checks import *\nfrom benchmarks.problems import *\n" + code,
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(x.stdout.strip() for x in runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=32",  # a launch frees less
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'cuda'}",
        },
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    assert found.stdout.count("right:") == right
