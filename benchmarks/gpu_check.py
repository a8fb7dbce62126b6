"""One command on a GPU machine: build, check every algorithm and type, then time them.

    python -m benchmarks.gpu_check [--quick] [--out FOLDER]

Exit status: 0 where all checks passed (whatever the speed), 1 where one failed, 2 for a mistake on
the command line, 3 without a GPU. The JSON is written anew after every stage.
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

from .tables import write_json

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 3


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


def run(stages: Sequence[Any], path: Path, seconds: float) -> dict[str, Any]:
    """Run stage after stage; each adds its part to the report, which is written every time.

    A stage is a function of a deadline (``time.monotonic``) that returns its part: rows, and the
    texts of what failed and of what was left out for want of time. None but the last may take more
    than half of what is left.
    """
    report: dict[str, Any] = {**header(), "failed": [], "skipped": []}
    end = time.monotonic() + seconds
    for stage in stages:
        name, start = stage.__name__, time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        try:
            part = stage(end if stage is stages[-1] else (start + end) / 2)
        except Exception as error:  # the other stages still say something
            part = {"failed": [f"{type(error).__name__}: {error}"]}
        report["failed"] += [f"{name}: {text}" for text in part.pop("failed", [])]
        report["skipped"] += [f"{name}: {text}" for text in part.pop("skipped", [])]
        report[name] = part | {"seconds": round(time.monotonic() - start, 1)}
        write_json(path, report)
        print(f"{time.monotonic() - start:.0f} s, {len(report['failed'])} failures", flush=True)
    return report


def file_name(report: dict[str, Any]) -> str:
    """Of a GPU, a commit and a day, as ``h200-0123456789-2026-01-31.json``."""
    gpu = report.get("gpu", "cpu").lower().replace("nvidia", "").strip().replace(" ", "-")
    return f"{gpu}-{report['commit'][:10]}-{report['date'][:10]}.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="two minutes instead of eight")
    parser.add_argument("--seconds", type=float, help="time after which nothing new is begun")
    parser.add_argument("--no-build", action="store_true", help="take the modules as they are")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA GPU that torch can use; nothing was checked", file=sys.stderr)
        return NO_GPU
    if not arguments.no_build and not arguments.sanitized:
        start = time.monotonic()
        build()
        print(f"build ... {time.monotonic() - start:.0f} s", flush=True)
    from . import gpu_checks, gpu_stages  # import fastlstm, which may have been missing until here

    if arguments.sanitized:
        return gpu_checks.sanitized()
    seconds = arguments.seconds or (100.0 if arguments.quick else 440.0)
    path = arguments.out / file_name(header())
    report = run(gpu_stages.stages("cuda", arguments.quick), path, seconds)
    print(gpu_stages.summary(report))
    print(path)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
