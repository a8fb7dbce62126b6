"""about.json: what a run was made by, for its page and for ``fastlstm.compare``."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import __version__
from ...machine import processor
from ...ops import native
from .. import UserError
from ..alphabet import Alphabet
from ..files import write_text

if TYPE_CHECKING:
    from .job import Job

NAME = "about.json"


def record(job: Job, argv: Sequence[str] | None) -> dict[str, Any]:
    """Write about.json of a run that begins or goes on, and return what it holds.

    Raises:
        UserError: it cannot be written.
    """
    path = job.run.folder / NAME
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "fastlstm.train", *words])
    before = read(path) if job.resumed else {}
    if job.ended and before:  # nothing to do: the run stays what it was
        return before
    found = {
        "commands": [*before.get("commands", []), command],
        "machine": _machine(job),
        "text": _text(job),
    }
    if job.run.writes:
        try:
            write_text(path, json.dumps(found, indent=2) + "\n")
        except OSError as error:
            folder = job.run.folder
            raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from error
    return found


def read(path: Path) -> dict[str, Any]:
    """What the file says; nothing, where it is missing or none of ours, as in older runs."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = {"commands": list, "machine": dict, "text": dict}
    valid = isinstance(found, dict) and all(isinstance(found.get(k), v) for k, v in kinds.items())
    return found if valid else {}


def _machine(job: Job) -> dict[str, Any]:
    """Hardware, threads and versions, by the names that pages show."""
    device = job.device
    found: dict[str, Any] = {"processor": processor()}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    return found | {
        "device": str(device),
        "processes": job.team.size,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction set": native._C.cpu_selected(),
        "precision": job.config.precision,
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "fastlstm": __version__,
    }


def _text(job: Job) -> dict[str, Any]:
    """Statistics of the text, and the sizes of the model that reads it."""
    streams, unit = job.streams, f"{job.unit.name}s"
    corpus = streams["train"].corpus
    found: dict[str, Any] = {"text": " ".join(job.config.data)}
    if corpus.summary:
        found["read"] = corpus.summary
    counts = corpus.counts(streams["train"].end)
    share = counts[counts > 0].double() / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    ends = [stream.end for stream in streams.values()]
    parts = {"train": "to train on", "val": "to validate on", "test": "to test on"}
    sizes = dict(zip(streams, [b - a for a, b in zip([0, *ends], ends, strict=False)], strict=True))
    bytes_each = {}
    if job.config.unit != "byte":
        bytes_each = {f"bytes a {job.unit.each} {parts[name]}": float(f"{stream.bytes_each:.7g}")
                      for name, stream in streams.items()}  # fmt: skip
    each, size = ("byte", streams["train"].bytes_each) if job.unit.in_bytes else ("character", 1.0)
    return found | {
        unit: len(corpus.data),
        **{f"{unit} {parts[name]}": size for name, size in sizes.items()},
        **bytes_each,
        f"different {unit}": len(corpus.occurring),
        "the most frequent": _names(counts, job.alphabet),
        f"bits a {each} by frequencies alone": round(max(entropy, 0.0) / size, 3),
        f"bits a {each} of a blind guess": round(math.log2(len(corpus.occurring)) / size, 3),
        "parameters of the model": sum(p.numel() for p in job.model.parameters()),
    }


def _names(counts: torch.Tensor, alphabet: Alphabet, most: int = 5) -> str:
    """The commonest characters or tokens with their shares."""
    total, top = int(counts.sum()), counts.topk(min(most, len(counts)))
    return ", ".join(f"{alphabet.name(j)} {n / total:.1%}"
                     for n, j in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                     if n)  # fmt: skip
