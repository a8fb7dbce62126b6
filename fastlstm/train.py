"""Train a character-level language model: ``python -m fastlstm.train``.

``loop`` is the whole method: advance, evaluate, sample, save, report. A step reads the next window
of the text, with the state carried over from the one before and its gradient cut there (truncated
backpropagation through time), and ends with cross-entropy, clipping and an optimizer step.
text/training/job.py says what Job, Run, Request and Progress are.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .text import UserError, cli
from .text import model as models
from .text.training import divergence
from .text.training.divergence import DivergedError
from .text.training.interrupts import Interrupts

if TYPE_CHECKING:  # these import what the trainer alone needs
    from .text.training.job import Job, Step
    from .text.training.screen import Screen
    from .text.training.trackers import Tracker

EPOCH_CHECKPOINTS = 20  # at most in a run, evenly spread
SAVE_SECONDS = 60.0  # of work that a killed run may lose
PLOT_SECONDS = 10.0  # between two loss.png
REPORT_SECONDS = 5.0  # between two pages
SAMPLE_LENGTH = 400


def loop(job: Job, screen: Screen, trackers: list[Tracker], interrupts: Interrupts) -> int:
    """Train until the run is as long as asked, gets no better, or is interrupted.

    Returns:
        The number of the signal that interrupted it, or 0.

    Raises:
        DivergedError: the loss is no number, or far above that of a blind guess.
    """
    job.start_clocks()
    job.model.train()
    job.run.report(lambda: job.snapshot("training"))
    while not job.ended:
        step = advance(job, interrupts.number)
        evaluate_if_due(job, step)
        record(job, step)
        sample_if_due(job, step)
        save_if_due(job, step)
        report(job, step, screen, trackers)
        if step.signal:
            return step.signal
    return 0


def advance(job: Job, signal: int) -> Step:
    """Read the next window, take an optimizer step, and count it.

    Args:
        signal: number of the one that this process received, or 0.

    Raises:
        DivergedError: before the weights change.
    """
    from .text.training.schedule import learning_rate

    progress, data = job.progress, job.streams["train"]
    started = time.monotonic()
    rate = learning_rate(job.config, progress.step, job.total, progress.epoch)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    x, y = data.window(progress.position)
    with job.autocast():
        logits, hx = job.forward(x.to(job.device), job.hx)
        loss = models.loss_nats(logits, y.to(job.device))
    step = optimize(job, loss, rate, signal)
    job.hx = models.detached(hx)
    step.speed = job.config.batch_size * data.steps / (time.monotonic() - started)
    job.rate = 0.9 * job.rate + 0.1 * step.speed if job.rate else step.speed
    count(job, step)
    return step


def optimize(job: Job, loss: Tensor, rate: float, signal: int) -> Step:
    """Backward, clipping and the optimizer's step; what the team agrees on.

    Raises:
        DivergedError: before the weights change.
    """
    from .text.training.job import Step

    job.optimizer.zero_grad(set_to_none=True)
    job.scaler.scale(loss).backward()
    job.scaler.unscale_(job.optimizer)
    grads = [p.grad for p in job.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    overdue = time.monotonic() - job.saved > SAVE_SECONDS
    losses, signals, overdues = zip(*job.team.numbers(loss.item(), signal, overdue), strict=True)
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
    return Step(rate, nats, norm.item(), int(max(signals)), bool(overdues[0]))


def count(job: Job, step: Step) -> None:
    """Count the step; an epoch that ends may be due for a checkpoint."""
    progress, windows = job.progress, job.streams["train"].windows
    progress.step += 1
    progress.position += 1
    step.epochs = progress.epoch + progress.position / windows
    if progress.position < windows:
        return
    progress.epoch, progress.position = progress.epoch + 1, 0
    job.hx = None  # the next epoch begins with an empty memory
    every = -(-job.total // (windows * EPOCH_CHECKPOINTS))
    if progress.epoch % every == 0:
        step.checkpoints.append(f"epoch-{progress.epoch}")


def evaluate_if_due(job: Job, step: Step) -> None:
    """Score the held-out text, and note whether the model got better.

    Raises:
        DivergedError: the validation loss is no number, or far above that of a blind guess.
    """
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


def record(job: Job, step: Step) -> None:
    """Write the step's line of metrics.jsonl."""
    progress = job.progress
    progress.seconds = time.monotonic() - job.begun
    job.run.metrics.log(
        progress.step, step.epochs, step.nats, step.val, step.speed, progress.seconds,
        step.rate, step.norm, job.run.scale,
    )  # fmt: skip


def sample_if_due(job: Job, step: Step) -> None:
    """Let the model write."""
    every, number = job.config.sample_every, job.progress.step
    if every and (number % every == 0 or number == job.total) and job.run.writes:
        step.sample = job.sample(SAMPLE_LENGTH)


def save_if_due(job: Job, step: Step) -> None:
    """Write the checkpoints that are due.

    Raises:
        DivergedError: a weight is no finite number.
    """
    if step.evaluated or step.checkpoints or step.signal or step.overdue:
        divergence.check_weights(job.model, job.progress.step)
        job.save("latest", *step.checkpoints)


def report(job: Job, step: Step, screen: Screen, trackers: list[Tracker]) -> None:
    """The screen, the trackers, loss.png after an evaluation, report.html.

    It comes last, for whoever reads the output may have left.
    """
    if step.sample is not None:
        screen.sample(step.sample)
    screen.show(job, step)
    for tracker in trackers:
        if step.sample is not None:
            tracker.sample(job.progress.step, step.sample)
        tracker.log(job.progress.step, step.figures(job.run.scale))
    if step.evaluated:
        job.run.plot(PLOT_SECONDS)
    job.run.report(lambda: job.snapshot("training"), REPORT_SECONDS)


def score_test_text(job: Job) -> float | None:
    """The loss on the text to test on, where there is one.

    Raises:
        DivergedError: it is no number, or far above that of a blind guess.
    """
    if "test" not in job.streams:
        return None
    test = job.evaluate("test")
    divergence.check(f"the test loss {test:.3g}", test, job.model.vocabulary)
    return test


def work(job: Job) -> int:
    """Train, and return the command's exit status."""
    from .text.training.network import is_compilers
    from .text.training.screen import Screen
    from .text.training.trackers import open_trackers

    allow_tf32(job)
    trackers = open_trackers(job)
    screen = Screen(job)
    status = "stopped by an error"
    try:
        with screen.bar, Interrupts() as interrupts:
            signal = loop(job, screen, trackers, interrupts)
        summary, status = ending(job, signal)
    except DivergedError as error:
        status = "stopped: the loss diverged"
        if job.run.writes:
            low = ", or --precision fp32" if job.config.precision in ("bf16", "fp16") else ""
            print(
                f"fastlstm.train: {error}: stopped. {job.run.folder} keeps its checkpoints; try a "
                f"lower --lr or --clip-norm{low}",
                file=sys.stderr,
            )
        return 1
    except OSError as error:
        if cli.reader_has_left(error):  # between two steps, where output is written
            status = "stopped: whoever read its output has left"
            if job.team.size == 1:
                job.save("latest")
        raise
    except Exception as error:
        if job.config.compile and is_compilers(error):
            raise UserError(
                f"--compile: {cli.first_line(error)}; --resume --no-compile goes on"
            ) from error
        raise
    finally:
        close(job, trackers, status)
    if job.run.writes:
        print(summary)
    job.team.leave()
    return 128 + signal if signal else 0


def ending(job: Job, signal: int) -> tuple[str, str]:
    """What to print at the end of a run, and its status on the page.

    Raises:
        DivergedError: the test loss is no number, or far above that of a blind guess.
    """
    from .text.training.screen import farewell

    if signal:
        where = f"stopped and saved at step {job.progress.step:,}"
        return f"\n{where}; go on with: {job.resume_command}", "interrupted"
    summary = farewell(job, score_test_text(job))
    if job.stale:
        return summary, f"finished early: {job.why_stale}"
    return summary, "finished"


def close(job: Job, trackers: list[Tracker], status: str) -> None:
    """Close the run's files, and leave a last curve and page."""
    from .text.training.trackers import close_all

    job.run.close()
    # Where a full disk has stopped the run, the first error is the one to show.
    with suppress(OSError) if status == "stopped by an error" else nullcontext():
        close_all(trackers)
        job.run.plot()
        job.run.report(lambda: job.snapshot(status))


def allow_tf32(job: Job) -> None:
    """On a GPU, let products take tf32 unless the precision is fp32."""
    if job.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = job.config.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = job.config.precision != "fp32"


def keep_freed_memory() -> None:
    """Have glibc keep freed pages, which each step would otherwise fault in again."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def train(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    import matplotlib  # noqa: F401  missing it should not show after an hour
    import tqdm  # noqa: F401

    from .text.training.prepare import prepare

    job = prepare(argv)
    try:
        return work(job)
    except BrokenPipeError:  # the reader of the output has left
        raise
    except (MemoryError, RuntimeError) as error:
        if job.team.local or not cli.is_of_memory(error):  # whose line say would not print
            raise
        advice = "a smaller --batch-size, --seq-length or --hidden-size takes less"
        if job.progress.step:
            advice = f"{job.run.folder} keeps its last checkpoint"
        else:
            job.run.abandon()
        raise UserError(f"out of memory: {cli.first_line(error)}; {advice}") from error
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'the output'}: {error.strerror or error}; "
            f"{job.run.folder} keeps its last checkpoint, go on with: {job.resume_command}"
        ) from error
    finally:
        job.run.release()


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    keep_freed_memory()
    cli.run("fastlstm.train", lambda: train(argv))


if __name__ == "__main__":
    main()
