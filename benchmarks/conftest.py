"""What the suites share: --quick, memory that stays with the process, the JSON, the last table."""

from __future__ import annotations

import platform
import sys
from typing import Any

import pytest
import torch

from fastlstm import _C
from fastlstm.train import keep_freed_memory

from .machine import CEILINGS, processor
from .suite import ROWS, Suite, finish, last_table, recorded


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--quick", action="store_true", help="tiny problems: whether it runs at all")


def pytest_itemcollected(item: Any) -> None:
    item.add_marker(pytest.mark.benchmark(timer=recorded))


@pytest.fixture(scope="session", autouse=True)
def _machine():
    keep_freed_memory()  # for all candidates alike
    torch.manual_seed(0)


@pytest.fixture
def suite(request, benchmark):
    return Suite(benchmark, request.config.getoption("--quick"))


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: Any) -> None:
    """What benchmarks/report.py reads: the tables' rows, and what they were measured on."""
    del config, benchmarks
    finish()
    commit = output_json["commit_info"]
    for test in output_json["benchmarks"]:
        info = test["extra_info"]
        info["commit"] = commit["id"] + (" and edits" if commit["dirty"] else "")
        if rate := CEILINGS.get(info.get("ceiling", "")):
            info["of_ceiling"] = 1e9 * info["gflops"] / rate
    output_json["fastlstm"] = {
        "date": output_json["datetime"][:10],
        "processor": f"{processor()}, {_C.cpu_selected()}",
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit["id"],
        "dirty": commit["dirty"],
        "command": "pytest " + " ".join(x for x in sys.argv[1:] if "json" not in x),
        "ceilings": CEILINGS,
        "rows": ROWS,
    }


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        terminalreporter.write_line("")
        terminalreporter.write_line(last_table())
