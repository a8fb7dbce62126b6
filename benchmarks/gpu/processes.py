"""Runs groups of tasks, each group in a process of its own, and hands on what each task answers.

A process that a task kills, or that does not answer in time, costs that task alone: it becomes a
failure with the status and the last words on stderr, and the rest of its group goes on in a new
process. A group's process loads its modules while the group before it still runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..measured import ROOT

Part = dict[str, Any]  # rows, failed, skipped (lists), and what else a stage reports
Take = Callable[[str, Part], None]

COMMAND = [sys.executable, "-m", "benchmarks.gpu.worker"]
START_SECONDS = 120.0  # for loading torch
GRACE = 10.0  # that a task may go on after the end
LAST_WORDS = 3  # lines of stderr in a failure


@dataclass(frozen=True)
class Task:
    """One call of ``check``, a function of a module, with keyword arguments that JSON can hold."""

    name: str
    check: Callable[..., Part]
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 30.0  # without an answer, after which its process is killed

    def line(self) -> bytes:
        where = f"{self.check.__module__}:{self.check.__qualname__}"
        task = {"name": self.name, "check": where, "arguments": self.arguments}
        return json.dumps(task).encode() + b"\n"


@dataclass(frozen=True)
class Group:
    stage: str
    tasks: tuple[Task, ...]


def run(groups: Sequence[Group], at_once: int, end: float, take: Take) -> None:
    """Run ``at_once`` groups side by side until ``end`` (``time.monotonic``).

    ``take`` gets a stage and a part for every task, in the order of their answers; a task that the
    end comes before is skipped.
    """

    async def every() -> None:
        processes = asyncio.Semaphore(at_once + 1)  # one more loads meanwhile
        turns = asyncio.Semaphore(at_once)
        await asyncio.gather(*(_Run(group, end, take).run(processes, turns) for group in groups))

    asyncio.run(every())


@dataclass
class _Run:
    """A group under way, and the process that runs it."""

    group: Group
    end: float
    take: Take
    left: list[Task] = field(init=False)

    def __post_init__(self) -> None:
        self.left = list(self.group.tasks)

    async def run(self, processes: asyncio.Semaphore, turns: asyncio.Semaphore) -> None:
        async with processes:
            await self._process(turns)
            while self.left:
                await self._process(turns)

    def _give(self, **part: Any) -> None:
        self.take(self.group.stage, part)

    def _skip(self) -> None:
        self._give(skipped=[f"{task.name}: no time left" for task in self.left])
        self.left = []

    async def _process(self, turns: asyncio.Semaphore) -> None:
        """Do tasks in a new process until it ends, or all are done."""
        if time.monotonic() > self.end:
            return self._skip()
        with tempfile.TemporaryFile() as stderr:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                start_new_session=True, limit=1 << 24,
            )  # fmt: skip
            try:
                if await _answer(process, START_SECONDS) is None:
                    how = await _ended(process) or f"not in {START_SECONDS:.0f} s"
                    names = f"{self.left[0].name} and {len(self.left) - 1} more"
                    self._give(failed=[f"{names}: no start, {how}{_last(stderr)}"])
                    self.left = []
                    return
                async with turns:
                    await self._tasks(process, stderr)
            finally:
                with suppress(ProcessLookupError):  # and whatever it started
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    async def _tasks(self, process: Process, stderr: Any) -> None:
        assert process.stdin is not None
        while self.left:
            if time.monotonic() > self.end:
                return self._skip()
            task = self.left[0]
            seconds = min(task.seconds, self.end + GRACE - time.monotonic())
            process.stdin.write(task.line())
            part = await _answer(process, seconds)
            if part is None:
                how = await _ended(process)
                if how is None and seconds < task.seconds:
                    return self._skip()
                how = how or f"no answer in {seconds:.0f} s"
                self.left.pop(0)
                return self._give(failed=[f"{task.name}: {how}{_last(stderr)}"])
            self.left.pop(0)
            over = part.pop("over", False)
            self._give(**part)
            if over:
                return


async def _answer(process: Process, seconds: float) -> Part | None:
    """The next line; None where the process ended before it was whole, or does not answer."""
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), seconds)
    except asyncio.TimeoutError:
        return None
    return json.loads(line) if line.endswith(b"\n") else None


async def _ended(process: Process) -> str | None:
    """How a process ended that gave no answer; None where it did not."""
    try:
        status = await asyncio.wait_for(process.wait(), 1)
    except asyncio.TimeoutError:
        return None
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _last(stderr: Any) -> str:
    stderr.seek(0)
    lines = [line.strip() for line in stderr.read().decode(errors="replace").splitlines()]
    return "".join(f" | {line}" for line in [x for x in lines if x][-LAST_WORDS:])
