"""Machine code that nvcc made, as nvdisasm prints it: its order, what stands inside loops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import networkx

# `/*0180*/  @!P0 BRA `(.L_x_0) ;`
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\S+)([^;]*);")
_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")  # without a predicate, nothing follows


def disassembler() -> str | None:
    """nvdisasm on PATH, or of the package nvidia-cuda-nvdisasm; None without either."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)


def disassembled(cubin: Path) -> dict[str, list[str]]:
    """The lines of every kernel of a cubin file, by its mangled name."""
    command = [str(disassembler()), str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[str]] = {}
    for section in re.split(r"^\s*\.section\s+", text, flags=re.M):
        name = re.match(r"\.text\.(\w+)", section)
        if name:
            kernels[name[1]] = section.splitlines()
    return kernels


def opcodes_of(lines: list[str]) -> list[str]:
    """Of a kernel's instructions, in the order in which they stand."""
    return [found[2] for line in lines if (found := _INSTRUCTION.search(line))]


def in_loops(lines: list[str]) -> list[str]:
    """The opcodes of a kernel's instructions that can run more than once.

    Those are the instructions on a cycle of the control flow: a path leads from each back to it.
    """
    flow = networkx.DiGraph()
    opcodes: list[str] = []
    jumps: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.search(line):
            predicate, opcode, operands = found.groups()
            here = len(opcodes)
            opcodes.append(opcode)
            jumps += [(here, target) for target in re.findall(r"`\((\.L_\w+)\)", operands)]
            if predicate or opcode.split(".")[0] not in _ENDS:
                flow.add_edge(here, here + 1)
    flow.add_edges_from((here, labels[target]) for here, target in jumps if target in labels)
    return [
        opcodes[j]
        for component in networkx.strongly_connected_components(flow)
        if len(component) > 1
        for j in component
        if j < len(opcodes)
    ]
