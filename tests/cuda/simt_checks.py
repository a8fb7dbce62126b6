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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Mutant:
    """A library with planted bugs, and the number of the one that is switched on; 0: none."""

    library: Path
    number: int


def is_seen(mutant: Mutant, module: str, function: str, *arguments: Any) -> bool:
    """Whether a function finds the bug of a planted library, or dies of it.

    It runs in a process of its own, for what a bug reads or writes may be anything.

    Args:
        mutant: whose library is loaded.
        module, function: what is called with the loaded library and ``arguments``.
    """
    _start_server()
    child = _processes.Process(target=_look, args=(mutant, module, function, arguments))
    child.start()
    child.join(600)
    if child.exitcode is None:
        child.kill()
        pytest.fail("ten minutes were not enough")
    assert child.exitcode in (0, MISSED) or child.exitcode < 0, "the test itself failed"
    return child.exitcode != MISSED


def _look(mutant: Mutant, module: str, function: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    look = getattr(importlib.import_module(module), function)
    os.environ["SIMT_MUTANT"] = str(mutant.number)  # which the library reads while it is loaded
    sys.exit(0 if look(ctypes.CDLL(str(mutant.library)), *arguments) else MISSED)


# A file of csrc/cuda, a text in it and what stands there instead; where the text is in the file
# more than once, also a longer text that holds the one that is meant.
Bug = tuple[str, str, str] | tuple[str, str, str, str]
NO_BUG = "no bug"


def plant(
    bugs: dict[str, Bug],
    folder: Path,
    build: Callable[..., Path] = make,
    types: str = "bf16",
    kinds: str = "",
    only: Sequence[Bug] = (),
    alone: Sequence[str] = (),
) -> dict[str, Mutant]:
    """One library that holds all bugs, each with a switch, and ``NO_BUG``: with none switched on.

    Only the kernels' objects differ from those of the race build.

    Args:
        bugs: whose texts are whole statements or whole expressions.
        types, kinds: of the kernels that the library holds, as in the Makefile of simt; without
            kinds, every one.
        only: files, statements in them, and the shapes of kernels for which those are compiled:
            the shapes that the tests run. With another one the process ends.
        alone: bugs that cannot have a switch, as in a constant: each has a library of its own.
    """
    base = build("race").parent
    includes = {path: path.with_suffix(".d").read_text() for path in base.glob("*.o")}
    of_kinds = tuple(kinds.split()) or ""
    held = {"KINDS": kinds} if kinds else {}

    def library(name: str, edits: Sequence[_Edit]) -> Path:
        out = folder / name.replace(" ", "_")
        kernels = out / "cuda"
        shutil.copytree(ROOT / "csrc" / "cuda", kernels)
        changed = {edit.file for edit in edits}
        # The others' copies of inline functions do not count: the kernels come first in the link.
        anew = {x for x in includes if any(f"/{file}" in includes[x] for file in changed)}
        anew = {x for x in anew if x.stem.startswith(of_kinds)}
        for file, statement, shapes in only:
            if any(f"/{file}" in includes[x] for x in anew):
                limited = f"if constexpr (!({shapes})) std::_Exit(1); else {statement}"
                edits = [*edits, _edit(name, (file, statement, limited))]
        for file in {edit.file for edit in edits}:
            text = (kernels / file).read_text()
            (kernels / file).write_text(_changed(text, [e for e in edits if e.file == file]))
        for path in includes.keys() - anew:
            (out / path.name).symlink_to(path)
        return build("race", CUDA=str(kernels), OUT=str(out), TYPES=types, **held)

    switched = [name for name in bugs if name not in alone]
    edits = [_edit(name, bugs[name], j) for j, name in enumerate(switched, 1)]
    all_bugs = library("all bugs", edits)
    found = {name: Mutant(all_bugs, j) for j, name in enumerate([NO_BUG, *switched])}
    return found | {
        name: Mutant(library(name, [_edit(name, bugs[name])]), 0) for name in bugs if name in alone
    }


@dataclass(frozen=True)
class _Edit:
    name: str
    file: str
    start: int
    end: int
    instead: str
    number: int  # of the switch; 0: none


def _edit(name: str, bug: Bug, number: int = 0) -> _Edit:
    file, text, instead, *longer = bug
    around = longer[0] if longer else text
    whole = (ROOT / "csrc" / "cuda" / file).read_text()
    assert whole.count(around) == 1, f"{file} no longer holds the text that {name!r} replaces"
    assert around.count(text) == 1, f"{name!r}: which {text!r}?"
    start = whole.index(around) + around.index(text)
    return _Edit(name, file, start, start + len(text), instead, number)


def _changed(text: str, edits: Sequence[_Edit]) -> str:
    """A file's text with all edits. One may lie in another: the inner ones are made first."""
    grown: dict[_Edit, int] = {}
    for edit in sorted(edits, key=lambda e: e.end - e.start):
        for other in grown:
            assert (
                other.end <= edit.start
                or edit.end <= other.start
                or (edit.start <= other.start and other.end <= edit.end)
            ), f"{edit.name!r} and {other.name!r} overlap: one of them must be alone"
        start, end = (
            at + sum(more for e, more in grown.items() if e.end <= at)
            for at in (edit.start, edit.end)
        )
        before, instead = text[start:end], edit.instead
        if edit.number > 0 and before.rstrip().endswith((";", "}")):
            instead = (
                f"{{ if (simt::mutant == {edit.number}) {{ {instead} }} else {{ {before} }} }}"
            )
        elif edit.number > 0:
            instead = f"(simt::mutant == {edit.number} ? ({instead}) : ({before}))"
        text = text[:start] + instead + text[end:]
        grown[edit] = len(instead) - (end - start)
    return text


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
