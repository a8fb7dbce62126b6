"""``python -m fastlstm.info``: what was built, what this machine has, what will be used."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, ops


def info() -> dict[str, Any]:
    """What ``python -m fastlstm.info --json`` prints, as plain data."""
    built = ops._C.build_info()
    return {
        "fastlstm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built_with_torch": built["torch_built_with"],
        "compiler": built["compiler"],
        "cpu": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "instruction_sets_built": built["cpu_instruction_sets"],
            "instruction_sets_usable": ops._C.cpu_supported(),
            "instruction_set_used": ops._C.cpu_selected(),
        },
        "cuda": {
            "kernels_built": ops.has_cuda(),
            "torch_has_cuda": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(j) for j in range(torch.cuda.device_count())],
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _text(found: dict[str, Any]) -> str:
    cpu, cuda = found["cpu"], found["cuda"]
    devices = ", ".join(cuda["devices"]) or "none"
    if cuda["kernels_built"]:
        cuda_use = "fastlstm's CUDA kernels"
    elif cuda["devices"]:
        cuda_use = "torch's own LSTM: fastlstm's CUDA kernels were not built"
    else:
        cuda_use = "nothing: no device"
    lines = [
        f"fastlstm {found['fastlstm']}, torch {found['torch']}, Python {found['python']}",
        f"built with torch {found['built_with_torch']} by {found['compiler']}",
        "",
        f"CPU      {cpu['processor']}, {cpu['threads']} threads",
        f"  built  {', '.join(cpu['instruction_sets_built'])}",
        f"  usable {', '.join(cpu['instruction_sets_usable'])}",
        f"  used   {cpu['instruction_set_used']}   (FASTLSTM_CPU_ISA chooses another)",
        f"CUDA     torch built for {cuda['torch_has_cuda'] or 'none'}, devices: {devices}",
        f"  used   {cuda_use}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastlstm.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    found = info()
    print(json.dumps(found, indent=2) if arguments.json else _text(found))


if __name__ == "__main__":
    main()
