"""One command on a GPU machine: build, check every algorithm and type, then time them.

    python -m benchmarks.gpu_check [--quick] [--only STAGE,...] [--out FOLDER]

Exit status: 0 where all checks passed (whatever the speed), 1 where one failed, 2 for a mistake on
the command line, 3 without a GPU. The JSON and the text beside it are written anew with every row.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .measured import RESULTS, ROOT

# Right whoever else is on the GPU: these run side by side. What is timed runs alone.
CHECKS = ("parity", "dropin", "sanitizer", "determinism", "streams", "graphs")
TIMED = ("ceilings", "steps", "times", "text", "profile")
STAGES = (*CHECKS, *TIMED)

NO_GPU = 3
SECONDS, QUICK_SECONDS = 240.0, 90.0
CHECKS_SHARE = 0.5  # of the time, at the most, where something is timed after them


def build() -> None:
    """Both modules beside the sources; ninja compiles only what changed."""
    environment = {**os.environ, "FASTLSTM_CUDA": "1"}
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major == 9 else ""
    environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}{suffix}")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT, env=environment, check=True,
    )  # fmt: skip


def _said(*command: str) -> str:
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def header() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    changed = bool(_said("git", "status", "--porcelain", "--untracked-files=no"))
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": (_said("git", "rev-parse", "HEAD") or "unknown")
        + (" and edits" if changed else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        p: Any = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def check(
    names: Sequence[str], device: str, quick: bool, path: Path, seconds: float, **which: Any
) -> dict[str, Any]:
    """Run the stages of those names, and return the report that was written.

    Checks run side by side, and in half of the time where something is timed after them; what is
    timed runs alone. ``which``: the cases and problems, of gpu.stages.groups.
    """
    from .gpu import processes, stages  # import fastlstm, which may not be built until here
    from .gpu.report import Report

    report = Report(path, header())
    start = time.monotonic()
    checks = [name for name in CHECKS if name in names]
    timed = [name for name in TIMED if name in names]
    for part, side_by_side in ((checks, stages.at_once()), (timed, 1)):
        share = CHECKS_SHARE if part is checks and timed else 1.0
        groups = stages.groups(part, device, quick, **which)
        for empty in set(part) - {group.stage for group in groups}:
            report.take(empty, {"skipped": ["there is nothing to run"]})
        processes.run(groups, side_by_side, start + share * seconds, report.take)
        if part:
            took, failures = time.monotonic() - start, len(report.data["failed"])
            print(f"{', '.join(part)}: {took:.0f} s, {failures} failures", flush=True)
    report.data["seconds"] = round(time.monotonic() - start, 1)
    report.write()
    return report.data


def file_name(report: dict[str, Any]) -> str:
    """Of a GPU, a commit and a day, as ``h200-0123456789-2026-01-31.json``."""
    gpu = report.get("gpu", "cpu").lower().replace("nvidia", "").strip().replace(" ", "-")
    return f"{gpu}-{report['commit'][:10]}-{report['date'][:10]}.json"


def stages_of(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(STAGES)}, with commas between, got {name!r}"
            )
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="90 seconds instead of four minutes")
    parser.add_argument(
        "--only", type=stages_of, default=STAGES, metavar="STAGE,...",
        help=f"some of {', '.join(STAGES)}",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="time after which nothing new is begun")
    parser.add_argument("--no-build", action="store_true", help="take the modules as they are")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA GPU that torch can use; nothing was checked", file=sys.stderr)
        return NO_GPU
    os.environ.setdefault("FASTLSTM_WAIT_SECONDS", "20")  # a hang costs a task no more
    if not arguments.no_build:
        start = time.monotonic()
        build()
        print(f"build: {time.monotonic() - start:.0f} s", flush=True)
    from .gpu.report import summary  # imports fastlstm

    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    path = arguments.out / file_name(header())
    report = check(arguments.only, "cuda", arguments.quick, path, seconds)
    print(summary(report))
    print(path)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
