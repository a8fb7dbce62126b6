"""What a run prints: a greeting, the bar or lines, samples, and what to type next."""

from __future__ import annotations

import shlex

from tqdm import tqdm

from .heartbeat import Heartbeat
from .job import Job, Step


class Screen:
    """The progress bar, or lines where there is no terminal; nothing in all processes but one."""

    def __init__(self, job: Job) -> None:
        writes = job.run.writes
        if writes:
            print(greeting(job))
        # Without a terminal there is no bar: heartbeat.py decides when a line is due.
        self.bar = tqdm(total=job.total, initial=job.progress.step, unit="step",
                        dynamic_ncols=True, disable=None if writes else True)  # fmt: skip
        self._heartbeat = Heartbeat(wanted=bool(writes and self.bar.disable))
        self._writes = writes

    def show(self, job: Job, step: Step) -> None:
        """The bar after a step; a line after an evaluation, or when one is due."""
        progress, unit, rate = job.progress, job.unit, f"{job.rate:,.0f} {job.unit.short}/s"
        nats, bits = f"loss {step.nats:.3f}{unit.per}", f"{job.bits(step.nats, 'train'):.3f}"
        self.bar.set_postfix_str(f"{nats}, {bits} {unit.bits}, {rate}", False)
        self.bar.update()
        if step.evaluated and self._writes:
            validation = ""
            if step.val is not None:
                validation = f"validation {_loss(job, step.val, 'val')}; "
            line = (
                f"step {progress.step:,} ({step.epochs:.2f} epochs, {progress.seconds:.0f} s): "
                f"{validation}training {_loss(job, step.nats, 'train')}; {rate}"
            )
        elif self._heartbeat.due():
            nats += f", {bits} {unit.bits}" if unit.in_bytes else ""
            line = f"step {progress.step:,}: {nats}, {rate}"
        else:
            return
        self.bar.write(line)
        self._heartbeat.printed()

    def sample(self, text: str) -> None:
        """What the model writes now, between two rules."""
        self.bar.write(f"{'':-<72}\n{text}\n{'':-<72}")


def _loss(job: Job, nats: float, name: str) -> str:
    """A loss over a split."""
    return f"{nats:.4f} nats{job.unit.per}, {job.bits(nats, name):.4f} {job.unit.bits}"


def greeting(job: Job) -> str:
    """What is trained on what."""
    config, data = job.config, job.streams["train"]
    text, occurring = data.corpus.data, data.corpus.occurring
    together = f", {job.team.size} processes" if job.team.size > 1 else ""
    lines = [
        f"{job.run.folder}: {config.num_layers}x{config.hidden_size} {config.cell}, "
        f"{sum(p.numel() for p in job.model.parameters()):,} parameters, {config.precision} on "
        f"{job.device}{together}",
        data.corpus.summary,
        f"{len(text):,} {job.unit.name}s of text, {len(occurring)} different ones; "
        f"{job.total:,} steps of {config.batch_size} x {config.seq_length}, "
        f"{job.total / data.windows:.2f} epochs",
        f"watch it: {(job.run.folder / 'report.html').resolve().as_uri()}",
    ]
    if job.resumed:
        where = f"step {job.progress.step:,} of {job.total:,}"
        lines.append(f"{where}: nothing to do" if job.ended else f"goes on from {where}")
    if config.unit == "char" and 0xFFFD in occurring:
        lines.append("some bytes of the text are no UTF-8: they are read as U+FFFD")
    return "\n".join(lines)


def farewell(job: Job, test: float | None) -> str:
    """How a finished run went, and what to type next.

    Args:
        test: the loss on the text to test on, in nats, where there is one.
    """
    progress, lines = job.progress, []
    if job.stale:
        lines.append(f"{job.why_stale}: stopped")
    if test is not None:
        each = "byte" if job.unit.in_bytes else "character"
        lines.append(
            f"test: {test:.4f} nats{job.unit.per}, {job.bits(test, 'test'):.4f} bits a {each}"
        )
    best = ""
    if progress.best is not None:
        best = f"; best validation {_loss(job, progress.best, 'val')}"
    run = shlex.quote(str(job.run.folder))
    lines += [
        f"{progress.step:,} steps in {progress.seconds:.0f} s{best}",
        f"sample:  python -m fastlstm.sample {run} -n 1000",
        f"go on:   {job.longer_command}",
    ]
    return "\n".join(lines)
