"""``python -m fastlstm.info``: what was built, what this machine has, what will be used."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from .ops import native


def info() -> dict[str, Any]:
    """What ``python -m fastlstm.info --json`` prints, as plain data."""
    built = native._C.build_info()
    gpus = range(torch.cuda.device_count())
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
            "instruction_sets_usable": native._C.cpu_supported(),
            "instruction_set_used": native._C.cpu_selected(),
        },
        "cuda": {
            "kernels_built": native.has_cuda(),
            "architectures": native.cuda_architectures(),
            "torch_has_cuda": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(j) for j in gpus],
            "kernels_missing": [native.missing_on_gpu(j) for j in gpus],
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


def _text(facts: dict[str, Any]) -> str:
    cpu, cuda = facts["cpu"], facts["cuda"]
    devices = ", ".join(cuda["devices"]) or "none"
    used = [
        f"{name}: " + (f"torch's own LSTM, for {missing}" if missing else "the CUDA kernels")
        for name, missing in zip(cuda["devices"], cuda["kernels_missing"], strict=True)
    ]
    lines = [
        f"fastlstm {facts['fastlstm']}, torch {facts['torch']}, Python {facts['python']}",
        f"built with torch {facts['built_with_torch']} by {facts['compiler']}",
        "",
        f"CPU      {cpu['processor']}, {cpu['threads']} threads",
        f"  built  {', '.join(cpu['instruction_sets_built'])}",
        f"  usable {', '.join(cpu['instruction_sets_usable'])}",
        f"  used   {cpu['instruction_set_used']}   (FASTLSTM_CPU_ISA chooses another)",
        f"CUDA     torch built for {cuda['torch_has_cuda'] or 'none'}, devices: {devices}",
        f"  built  {cuda['architectures'] or 'no kernels'}",
        *(f"  used   {line}" for line in used or ["nothing: no device"]),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fastlstm.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    facts = info()
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))


if __name__ == "__main__":
    main()
