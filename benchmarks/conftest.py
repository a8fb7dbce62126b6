"""What the suites share: memory that stays with the process, the machine's peak, the last table."""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastlstm import _C
from fastlstm.train import keep_freed_memory

from .tables import table
from .timing import geometric_mean, wall

ROWS: list[dict[str, Any]] = []
CEILINGS: dict[str, float] = {}  # FLOP/s of multiply-adds, bytes/s of a copy


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--quick", action="store_true", help="tiny problems: whether it runs at all")


@pytest.fixture
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture(scope="session", autouse=True)
def _machine():
    keep_freed_memory()  # for all candidates alike
    torch.manual_seed(0)


def multiply_add_rate(threads: int) -> float:
    """FLOP/s of all threads at once, from registers."""
    rounds = 4_000_000
    with ThreadPoolExecutor(threads) as pool:
        done = 0.0

        def run() -> None:
            nonlocal done
            done = sum(pool.map(_C.cpu_multiply_adds, [rounds] * threads))

        return max(done / wall(run, 1) for _ in range(3))


def copy_rate() -> float:
    """Bytes/s that torch reads and writes when it copies what no cache holds."""
    a = torch.ones(1 << 26)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(wall(lambda: b.copy_(a), 1) for _ in range(3))


@pytest.fixture
def peak():
    """Measures the ceilings again: on a shared host one moment's rate may be half of another's."""
    for name, rate in (("multiply_adds", peak_rate()), ("copy", copy_rate())):
        CEILINGS[name] = max(CEILINGS.get(name, 0.0), rate)


def peak_rate() -> float:
    return multiply_add_rate(torch.get_num_threads())


def finish() -> None:
    """What needs the highest rate of the whole run: fractions of it, and targets of them."""
    for row in ROWS:
        if "flops" not in row or not CEILINGS:
            continue
        row["of_peak"] = 1e3 * row["flops"] / row["ours"] / CEILINGS["multiply_adds"]
        if row["of_peak"] < row.get("least_of_peak", 0.0):
            row["met"] = "missed"


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: Any) -> None:
    """What benchmarks/report.py reads: the tables' rows, and what they were measured on."""
    del config, benchmarks
    finish()
    output_json["fastlstm"] = {
        "date": output_json["datetime"][:10],
        "processor": f"{processor()}, {_C.cpu_selected()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": output_json["commit_info"]["id"],
        "dirty": output_json["commit_info"]["dirty"],
        "command": "pytest " + " ".join(x for x in sys.argv[1:] if "json" not in x),
        "ceilings": CEILINGS,
        "rows": ROWS,
    }


@pytest.fixture
def rows():
    """Lines of the last table: dicts with what, case, ours, and what else there is to say."""
    return ROWS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    finish()
    head = ["what", "case", "ours ms", "torch ms", "onnx ms", "ratio", "of peak", "target", ""]
    keys = ["what", "case", "ours", "torch", "onnx", "ratio", "of_peak", "target", "met"]
    lines = [[row.get(key) for key in keys] for row in ROWS]
    terminalreporter.write_line("")
    terminalreporter.write_line(table(head, lines))
    for what in dict.fromkeys(row["what"] for row in ROWS if "ratio" in row):
        ratios = [row["ratio"] for row in ROWS if row["what"] == what and "ratio" in row]
        terminalreporter.write_line(f"{what}: geometric mean {geometric_mean(ratios):.2f}")
