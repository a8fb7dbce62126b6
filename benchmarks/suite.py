"""How the suite reports: a problem's candidates are timed in turn, then each has a test of its own.

The first test of a group has all its candidates timed, interleaved (timing.py); what was found is
kept for the tests that follow. Each hands its own samples to pytest-benchmark, whose timer is a
clock that a recorded sample moves on. So its tables and its JSON have every candidate's statistics,
and what is compared was measured in the same rounds.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fastlstm

from .backends import BACKENDS
from .cases import Case
from .machine import CEILINGS, ceiling, described, measure_ceilings, peak_memory
from .tables import TITLES, table
from .timing import Samples, geometric_mean, interleaved

# Lines of the last table: what, case, milliseconds by backend, and what else there is to say.
ROWS: list[dict[str, Any]] = []


class Clock:
    """Stands still but for ``tick``, which moves it on by the next recorded sample."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def play(self, samples: Iterable[float]) -> None:
        self.now, self.samples = 0.0, iter(samples)

    def tick(self) -> None:
        self.now += next(self.samples)


CLOCK = Clock()


def recorded() -> float:
    """pytest-benchmark's timer."""
    return CLOCK.now


@dataclass
class Group:
    """One problem's samples by candidate, and what else is known of each."""

    samples: dict[str, Samples]
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # skipped, and why
    wrong: dict[str, str] = field(default_factory=dict)  # whose numbers are off, and how far

    def notes(self) -> dict[str, str]:
        """For the group's row."""
        return {"note": "; ".join(self.wrong.values())} if self.wrong else {}

    def milliseconds(self) -> dict[str, float]:
        return {name: 1e3 * samples.median for name, samples in self.samples.items()}


FOUND: dict[str, Group] = {}  # figures alone: a group's modules go when it has been timed


@dataclass
class Suite:
    """What a test measures with."""

    benchmark: Any
    quick: bool

    def sized(self, case: Case) -> Case:
        return case.tiny() if self.quick else case

    def time(
        self,
        calls: Mapping[str, Callable[[], object]],
        flops: float | None = None,
        kind: str = "fp32",
    ) -> Group:
        """Time candidates on the CPU in turn, after its ceilings, and see what memory each needs.

        A turn waits, for threads of the last candidate may still spin.
        """
        if not self.quick or not CEILINGS:
            measure_ceilings()
        how: dict[str, Any] = {"pause": 0.1, "region": 0.03} if not self.quick else {"region": 0.0}
        group = Group(interleaved(calls, 3 if self.quick else 7, **how))
        for name, call in calls.items():
            # A call so long that one sample had to do is not made again.
            once = len(group.samples[name].seconds) == 1
            bytes_held = None if once else peak_memory(call, "cpu")
            group.info[name] = {
                "peak_megabytes": None if bytes_held is None else bytes_held / 1e6,
                **({"flops": flops, "ceiling": ceiling(kind)} if flops else {}),
            }
        return group

    def report(
        self, group: str, name: str, measure: Callable[[], Group], device: str = "cpu"
    ) -> None:
        """Hand a candidate's samples to pytest-benchmark; ``measure`` runs once for a group."""
        if group not in FOUND:
            FOUND[group] = measure()
        found = FOUND[group]
        if name in found.absent:
            pytest.skip(found.absent[name])
        assert name in found.samples, found.wrong[name]
        samples = found.samples[name]
        info = environment(device) | {"candidate": name} | found.info.get(name, {})
        if name in BACKENDS and (version := BACKENDS[name].version()):
            info[name] = version
        if name in found.wrong:
            info["wrong"] = found.wrong[name]
        if "flops" in info:
            info["gflops"] = info["flops"] / samples.median / 1e9
        self.benchmark.group = group
        self.benchmark.extra_info.update(info)
        CLOCK.play(samples.seconds)
        self.benchmark.pedantic(CLOCK.tick, rounds=len(samples.seconds))


def environment(device: str) -> dict[str, Any]:
    return {
        "device": described(device),
        "torch": torch.__version__,
        "fastlstm": fastlstm.__version__,
        "python": platform.python_version(),
    }


def finish() -> None:
    """What needs the highest rates of the whole run: fractions of them, and targets of those."""
    for row in ROWS:
        if "prepacked" in row:
            row["prepacked_ratio"] = row["ratio"] * row["fastlstm"] / row["prepacked"]
        rate = CEILINGS.get(row.get("ceiling", ""))
        least = row.get("least_of_peak", 0.0)
        if rate:
            row["of_peak"] = 1e3 * row["flops"] / row["fastlstm"] / rate
            if row["of_peak"] < least:
                row["met"] = "missed"
        elif least:
            row["met"] = row["met"] or "not known"


def last_table() -> str:
    finish()
    names = [name for name in TITLES if any(name in row for row in ROWS)]
    head = ["what", "case", *(f"{TITLES[name]} ms" for name in names)]
    keys = ["what", "case", *names, "ratio", "prepacked_ratio", "of_peak", "target", "met"]
    lines = [table([*head, "ratio", "prepacked", "of peak", "target", ""],
                   [[row.get(key) for key in keys] for row in ROWS])]  # fmt: skip
    for what in dict.fromkeys(row["what"] for row in ROWS if "ratio" in row):
        means = [
            f"{name}geometric mean {geometric_mean(ratios):.2f}"
            for key, name in (("ratio", ""), ("prepacked_ratio", "prepacked "))
            if (ratios := [row[key] for row in ROWS if row["what"] == what and key in row])
        ]
        lines.append(f"{what}: {', '.join(means)}")
    lines += [row["note"] for row in ROWS if "note" in row]
    return "\n".join(lines)
