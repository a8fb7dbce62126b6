"""Train a character-level language model: ``python -m fastlstm.train``.

``loop`` is the whole method: advance, evaluate, sample, save, report. A step reads the next window
of the text, with the state carried over from the one before and its gradient cut there (truncated
backpropagation through time), and ends with cross-entropy, clipping and an optimizer step.
text/training/__init__.py says what Job, Run, Request and Progress are.
"""

from __future__ import annotations

import ctypes
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .text import UserError, cli

if TYPE_CHECKING:  # these import what the trainer alone needs
    from .text.training.job import Job
    from .text.training.options import Config

EPOCH_CHECKPOINTS = 20  # at most in a run, evenly spread
SAVE_SECONDS = 60.0  # of work that a killed run may lose
REPORT_SECONDS = 5.0  # between two pages
SAMPLE_LENGTH = 400
LN2 = math.log(2)


def learning_rate(config: Config, step: int, total: int, epoch: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then the schedule.

    Only ``cosine`` looks at the run's length ``total``: under the others a run that is made longer
    equals one that was that long from the start.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "cosine":
        done = (step - config.warmup) / max(1, total - config.warmup)
        return config.lr * (0.01 + 0.495 * (1 + math.cos(math.pi * min(done, 1.0))))
    if config.lr_schedule == "step":  # char-rnn's
        return config.lr * 0.97 ** max(0, epoch - 9)
    return config.lr


class Interrupts:
    """Lets Ctrl-C and SIGTERM wait for the end of a step; the second one does not wait."""

    number: int | None = None

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number


def keep_freed_memory() -> None:
    """Have glibc keep freed pages, which each step would otherwise fault in again."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@dataclass
class Step:
    """What one optimizer step gave, and what is due after it.

    Attributes:
        rate: the learning rate.
        nats: the training loss over the whole team's streams.
        signal: number of the signal that any process of the team received, or 0.
        overdue: whether the last checkpoint is older than a killed run may lose.
        speed: characters a second.
        epochs: passes over the text that lie behind, with the fraction of the current one.
        evaluated: whether an evaluation was due.
        val: the validation loss, where there was one.
        checkpoints: names to save under, beside ``latest``.
    """

    rate: float
    nats: float
    signal: int
    overdue: bool
    speed: float
    epochs: float
    evaluated: bool = False
    val: float | None = None
    checkpoints: list[str] = field(default_factory=list)


class Screen:
    """The progress bar, or lines where there is no terminal, and TensorBoard's events.

    Raises:
        UserError: tensorboard is asked for and not installed.
    """

    def __init__(self, job: Job) -> None:
        from tqdm import tqdm

        from .text.training.board import Board
        from .text.training.heartbeat import Heartbeat

        config, progress, run = job.config, job.progress, job.run
        self.board = Board(run.folder / "tensorboard", progress.step,
                           config.tensorboard and run.writes)  # fmt: skip
        if run.writes:
            greet(job)
        # Without a terminal there is no bar: text/training/heartbeat.py decides when a line is due.
        self.bar = tqdm(total=job.total, initial=progress.step, unit="step", dynamic_ncols=True,
                        disable=None if run.writes else True)  # fmt: skip
        self.heartbeat = Heartbeat(wanted=bool(run.writes and self.bar.disable))


def loop(job: Job, screen: Screen, interrupts: Interrupts) -> int:
    """Train until the run is as long as asked, gets no better, or is interrupted.

    Returns:
        The number of the signal that interrupted it, or 0.

    Raises:
        DivergedError: the loss is no number, or far above that of a blind guess.
    """
    clock = time.monotonic
    begun, saved = clock() - job.progress.seconds, clock()
    job.model.train()
    job.run.report(lambda: job.snapshot("training"))
    while not job.ended:
        step = advance(job, interrupts.number or 0, clock() - saved > SAVE_SECONDS)
        evaluate_if_due(job, step)
        job.progress.seconds = clock() - begun
        job.run.metrics.log(
            job.progress.step, step.epochs, step.nats, step.val, step.speed, job.progress.seconds
        )
        sample_if_due(job, screen)
        if save_if_due(job, step):
            saved = clock()
        report(job, step, screen)
        if step.signal:
            return step.signal
    return 0


def advance(job: Job, signal: int, overdue: bool) -> Step:
    """Read the next window, take an optimizer step, and count it.

    Args:
        signal, overdue: as this process sees them; a step holds what the team agreed on.

    Raises:
        DivergedError: before the weights change.
    """
    from .text.model import detached, loss_nats

    config, progress, data = job.config, job.progress, job.streams["train"]
    started = time.monotonic()
    rate = learning_rate(config, progress.step, job.total, progress.epoch)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    x, y = data.window(progress.position)
    with job.autocast():
        logits, hx = job.forward(x.to(job.device), job.hx)
        loss = loss_nats(logits, y.to(job.device))
    nats, signal, overdue = optimize(job, loss, signal, overdue)
    job.hx = detached(hx)
    progress.step += 1
    progress.position += 1
    epochs = progress.epoch + progress.position / data.windows
    speed = config.batch_size * data.steps / (time.monotonic() - started)
    job.rate = 0.9 * job.rate + 0.1 * speed if job.rate else speed
    step = Step(rate, nats, signal, overdue, speed, epochs)
    if progress.position == data.windows:  # the next epoch begins with an empty memory
        progress.epoch, progress.position, job.hx = progress.epoch + 1, 0, None
        every = -(-job.total // (data.windows * EPOCH_CHECKPOINTS))
        if progress.epoch % every == 0:
            step.checkpoints.append(f"epoch-{progress.epoch}")
    return step


def optimize(job: Job, loss: Tensor, signal: int, overdue: bool) -> tuple[float, int, bool]:
    """Backward, clipping and the optimizer's step; the team's loss, signal and overdue.

    Raises:
        DivergedError: before the weights change.
    """
    from .text.training import divergence

    job.optimizer.zero_grad(set_to_none=True)
    job.scaler.scale(loss).backward()
    job.scaler.unscale_(job.optimizer)
    grads = [p.grad for p in job.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    numbers = job.team.numbers(loss.item(), signal, overdue)
    losses, signals, overdues = zip(*numbers, strict=True)
    nats = sum(losses) / len(losses)
    # fp16's scaler skips a step whose gradient is not finite, and scales less.
    finite = job.scaler.is_enabled() or bool(norm.isfinite())
    what = f"the loss {nats:.3g} of step {job.progress.step + 1:,}, its gradient {norm:.3g} long,"
    divergence.check(what, nats, job.model.vocabulary, finite)
    clip = job.config.clip_norm
    if clip > 0:
        torch.nn.utils.clip_grads_with_norm_(job.model.parameters(), clip, norm)
    job.scaler.step(job.optimizer)
    job.scaler.update()
    # The whole team stops when one of them was asked to, and saves when rank 0 does.
    return nats, int(max(signals)), bool(overdues[0])


def evaluate_if_due(job: Job, step: Step) -> None:
    """Score the held-out text, and note whether the model got better.

    Raises:
        DivergedError: the validation loss is no number, or far above that of a blind guess.
    """
    from .text.training import divergence

    progress = job.progress
    every = job.config.eval_every or job.streams["train"].windows
    step.evaluated = progress.step == job.total or progress.step % every == 0
    if not step.evaluated or "val" not in job.streams:
        return
    step.val = job.evaluate("val")
    what = f"the validation loss {step.val:.3g} after step {progress.step:,}"
    divergence.check(what, step.val, job.model.vocabulary)
    if progress.best is None or step.val < progress.best:
        progress.best, progress.worse = step.val, 0
        step.checkpoints.append("best")
    else:
        progress.worse += 1


def sample_if_due(job: Job, screen: Screen) -> None:
    """Show what the model writes now."""
    every, number = job.config.sample_every, job.progress.step
    if every and (number % every == 0 or number == job.total) and job.run.writes:
        text = job.sample(SAMPLE_LENGTH)
        screen.bar.write(f"{'':-<72}\n{text}\n{'':-<72}")
        screen.board.sample(number, text)


def save_if_due(job: Job, step: Step) -> bool:
    """Write the checkpoints that are due, and say whether any was."""
    due = step.evaluated or bool(step.checkpoints) or step.signal > 0 or step.overdue
    if due:
        job.save("latest", *step.checkpoints)
    return due


def report(job: Job, step: Step, screen: Screen) -> None:
    """The progress bar or a line, TensorBoard, loss.png after an evaluation, report.html."""
    progress, run, bar = job.progress, job.run, screen.bar
    bits, rate = step.nats / LN2, f"{job.rate:,.0f} chars/s"
    bar.set_postfix_str(f"loss {step.nats:.3f}, {bits:.3f} bpc, {rate}", False)
    bar.update()
    screen.board.step(progress.step, step.nats, step.val, step.rate, step.speed)
    if step.evaluated and run.writes:
        val = ""
        if step.val is not None:
            val = f"validation {step.val:.4f} nats, {step.val / LN2:.4f} bpc; "
        bar.write(
            f"step {progress.step:,} ({step.epochs:.2f} epochs, {progress.seconds:.0f} s): "
            f"{val}training {step.nats:.4f} nats, {bits:.4f} bpc; {rate}"
        )
        run.plot(at_least_after=10.0)
        screen.heartbeat.printed()
    elif screen.heartbeat.due():
        bar.write(f"step {progress.step:,}: loss {step.nats:.3f}, {rate}")
        screen.heartbeat.printed()
    run.report(lambda: job.snapshot("training"), at_least_after=REPORT_SECONDS)


def train(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    import matplotlib  # noqa: F401  missing it should not show after an hour
    import tqdm  # noqa: F401

    from .text.training.job import prepare

    job = prepare(argv)
    try:
        return work(job)
    except BrokenPipeError:  # the reader of the output has left
        raise
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'the output'}: {error.strerror or error}; "
            f"{job.run.folder} keeps its last checkpoint, go on with: {job.resume_command}"
        ) from error
    finally:
        job.run.release()


def work(job: Job) -> int:
    """Train, and return the command's exit status."""
    from .text.training.divergence import DivergedError
    from .text.training.job import is_compilers

    config, progress, run, team = job.config, job.progress, job.run, job.team
    if job.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    screen = Screen(job)
    status = "stopped by an error"
    try:
        with screen.bar, Interrupts() as interrupts:
            signal_number = loop(job, screen, interrupts)
        status = "interrupted" if signal_number else "finished"
        if not signal_number and 0 < config.patience <= progress.worse:
            status = f"finished early: no better validation loss in {config.patience} evaluations"
        summary = farewell(job, signal_number)
    except DivergedError as error:
        status = "stopped: the loss diverged"
        if run.writes:
            print(
                f"fastlstm.train: {error}: stopped. {run.folder} keeps its checkpoints; try a "
                "lower --lr or --clip-norm, or --precision fp32",
                file=sys.stderr,
            )
        return 1
    except Exception as error:
        if config.compile and is_compilers(error):
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--compile: {reason}; --resume --no-compile goes on") from error
        raise
    finally:
        run.close()
        # Where a full disk has stopped the run, the first error is the one to show.
        with suppress(OSError) if status == "stopped by an error" else nullcontext():
            screen.board.close()
            run.plot()
            run.report(lambda: job.snapshot(status))
    if run.writes:
        print(summary)
    team.leave()
    return 128 + signal_number if signal_number else 0


def greet(job: Job) -> None:
    """Say what is trained on what."""
    config, data = job.config, job.streams["train"]
    text, occurring = data.corpus.data, data.corpus.occurring
    together = f", {job.team.size} processes" if job.team.size > 1 else ""
    print(
        f"{job.run.folder}: {config.num_layers}x{config.hidden_size} {config.cell}, "
        f"{sum(p.numel() for p in job.model.parameters()):,} parameters, {config.precision} on "
        f"{job.device}{together}\n{data.corpus.summary}\n{len(text):,} {config.unit}s of text, "
        f"{len(occurring)} different ones; {job.total:,} steps of {config.batch_size} x "
        f"{config.seq_length}, {job.total / data.windows:.2f} epochs\n"
        f"watch it: {(job.run.folder / 'report.html').resolve().as_uri()}"
    )
    if job.resumed:
        where = f"step {job.progress.step:,} of {job.total:,}"
        print(f"{where}: nothing to do" if job.ended else f"goes on from {where}")
    if config.unit == "char" and 0xFFFD in occurring:
        print("some bytes of the text are no UTF-8: they are read as U+FFFD")


def farewell(job: Job, interrupted: int) -> str:
    """What to say at the end, and what to type next.

    Raises:
        DivergedError: the test loss is no number, or far above that of a blind guess.
    """
    from .text.training import divergence

    progress, config = job.progress, job.config
    if interrupted:
        return f"\nstopped and saved at step {progress.step:,}; go on with: {job.resume_command}"
    lines = []
    if 0 < config.patience <= progress.worse:
        lines.append(f"no better validation loss in {config.patience} evaluations: stopped")
    if "test" in job.streams:
        test = job.evaluate("test")
        divergence.check(f"the test loss {test:.3g}", test, job.model.vocabulary)
        lines.append(f"test: {test:.4f} nats, {test / LN2:.4f} bits a character")
    best = ""
    if progress.best is not None:
        best = f"; best validation {progress.best:.4f} nats, {progress.best / LN2:.4f} bpc"
    run = shlex.quote(str(job.run.folder))
    lines += [
        f"{progress.step:,} steps in {progress.seconds:.0f} s{best}",
        f"sample:  python -m fastlstm.sample {run} -n 1000",
        f"go on:   {job.resume_command} --steps {2 * progress.step}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    keep_freed_memory()
    cli.run("fastlstm.train", lambda: train(argv))


if __name__ == "__main__":
    main()
