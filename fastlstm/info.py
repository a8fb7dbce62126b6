"""``python -m fastlstm.info``: what was built, what this machine has, what will be used."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from .machine import processor
from .ops import native
from .text import cli


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
            "processor": processor(),
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


def parser() -> cli.Parser:
    """The command's flags."""
    p = cli.Parser(
        "info", description="Print what was built, what this machine has, and what will run."
    )
    p.add_argument("--json", action="store_true", help="print JSON")
    return p


def print_info(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit status."""
    arguments = parser().parse_args(argv)
    facts = info()
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm.info", lambda: print_info(argv))


if __name__ == "__main__":
    main()
