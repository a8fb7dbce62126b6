"""Train a character-level language model: ``python -m fastlstm.train``.

The loop at the end of this file is the whole method: windows of text in order, the state carried
from one to the next with its gradient cut (truncated backpropagation through time), cross-entropy,
clipping, an optimizer step; now and then an evaluation, a checkpoint and a sample.
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .text import UserError, cli

if TYPE_CHECKING:  # they import what only the trainer needs: see `main`
    from .text.board import Board
    from .text.job import Job
    from .text.options import Config

EPOCH_CHECKPOINTS = 20  # at most, evenly spread: short texts have thousands of epochs
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


def step(job: Job, x: Tensor, y: Tensor, also: Sequence[float]) -> tuple[float, list[list[float]]]:
    """Read a window and take an optimizer step.

    Args:
        also: what to tell the team's other processes.

    Returns:
        The loss in nats over the whole team's streams, and what each process told.

    Raises:
        DivergedError: before the weights change.
    """
    from .text import divergence
    from .text.model import detached, loss_nats

    with job.autocast():
        logits, hx = job.forward(x.to(job.device), job.hx)
        loss = loss_nats(logits, y.to(job.device))
    job.optimizer.zero_grad(set_to_none=True)
    job.scaler.scale(loss).backward()
    job.scaler.unscale_(job.optimizer)
    grads = [p.grad for p in job.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    told = job.team.numbers(loss.item(), *also)
    nats = sum(each[0] for each in told) / len(told)
    # fp16's scaler skips a step whose gradient is not finite, and scales less.
    fine = job.scaler.is_enabled() or bool(norm.isfinite())
    what = f"the loss {nats:.3g} of step {job.progress.step + 1:,}, its gradient {norm:.3g} long,"
    divergence.check(what, nats, job.model.vocabulary, fine)
    clip = job.config.clip_norm
    if clip > 0:
        torch.nn.utils.clip_grads_with_norm_(job.model.parameters(), clip, norm)
    job.scaler.step(job.optimizer)
    job.scaler.update()
    job.hx = detached(hx)
    return nats, [each[1:] for each in told]


def train(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    import matplotlib  # noqa: F401  missing it should not show after an hour
    import tqdm  # noqa: F401

    from .text.job import prepare

    job = prepare(argv)
    try:
        return work(job)
    except BrokenPipeError:  # whoever read the output has left
        raise
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'the output'}: {error.strerror or error}; "
            f"{job.run.folder} keeps its last checkpoint, go on with: {job.again}"
        ) from error
    finally:
        job.run.release()


def work(job: Job) -> int:
    """Train, and return the command's exit status."""
    from tqdm import tqdm

    from .text.board import Board
    from .text.divergence import DivergedError
    from .text.job import is_compilers

    config, progress, run, team = job.config, job.progress, job.run, job.team
    board = Board(run.folder / "tensorboard", progress.step, config.tensorboard and run.writes)
    if job.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    if run.writes:
        greet(job)
    # Without a terminal there is no bar; text/news.py says when a log gets a line instead.
    bar = tqdm(total=job.total, initial=progress.step, unit="step", dynamic_ncols=True,
               disable=None if run.writes else True)  # fmt: skip
    status = "stopped by an error"
    try:
        with bar, Interrupts() as interrupts:
            signalled = loop(job, bar, board, interrupts)
        status = "interrupted" if signalled else "finished"
        if not signalled and 0 < config.patience <= progress.worse:
            status = f"finished early: no better validation loss in {config.patience} evaluations"
        said = farewell(job, signalled)
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
            board.close()
            run.plot()
            run.report(lambda: job.state(status))
    if run.writes:
        print(said)
    team.leave()
    return 128 + signalled if signalled else 0


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
    from .text import divergence

    progress, config = job.progress, job.config
    if interrupted:
        return f"\nstopped and saved at step {progress.step:,}; go on with: {job.again}"
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
        f"go on:   {job.again} --steps {2 * progress.step}",
    ]
    return "\n".join(lines)


def loop(job: Job, bar: Any, board: Board, interrupts: Interrupts) -> int:
    """Train until the run is as long as asked, gets no better, or is interrupted.

    Returns:
        The number of the signal that interrupted it, or 0.

    Raises:
        DivergedError: the loss is no number, or far above that of a blind guess.
    """
    from .text import divergence
    from .text.news import News

    config, progress, run, data = job.config, job.progress, job.run, job.streams["train"]
    evaluate_every = config.eval_every or data.windows
    epoch_every = -(-job.total // (data.windows * EPOCH_CHECKPOINTS))
    clock = time.monotonic
    begun, saved = clock() - progress.seconds, clock()
    news = News(wanted=bool(run.writes and bar.disable))
    job.model.train()
    run.report(lambda: job.state("training"))
    while not job.ended:
        started = clock()
        rate = learning_rate(config, progress.step, job.total, progress.epoch)
        for group in job.optimizer.param_groups:
            group["lr"] = rate
        also = (interrupts.number or 0, clock() - saved > SAVE_SECONDS)
        nats, told = step(job, *data.window(progress.position), also)
        # The whole team does what one of them was asked to, and saves when rank 0 does.
        signalled, late = int(max(each[0] for each in told)), bool(told[0][1])
        progress.step += 1
        progress.position += 1
        epoch = progress.epoch + progress.position / data.windows
        speed = config.batch_size * data.steps / (clock() - started)
        job.rate = 0.9 * job.rate + 0.1 * speed if job.rate else speed
        names = []
        if progress.position == data.windows:  # the next epoch begins with an empty memory
            progress.epoch, progress.position, job.hx = progress.epoch + 1, 0, None
            names += [f"epoch-{progress.epoch}"] if progress.epoch % epoch_every == 0 else []
        ended = progress.step == job.total
        val = None
        if ended or progress.step % evaluate_every == 0:
            names += ["latest"]
            if "val" in job.streams:
                val = job.evaluate("val")
                what = f"the validation loss {val:.3g} after step {progress.step:,}"
                divergence.check(what, val, job.model.vocabulary)
                better = progress.best is None or val < progress.best
                progress.best = val if better else progress.best
                progress.worse = 0 if better else progress.worse + 1
                names += ["best"] if better else []
        progress.seconds = clock() - begun
        run.metrics.log(progress.step, epoch, nats, val, speed, progress.seconds)
        shows = config.sample_every and (progress.step % config.sample_every == 0 or ended)
        if shows and run.writes:
            text = job.sample(SAMPLE_LENGTH)
            bar.write(f"{'':-<72}\n{text}\n{'':-<72}")
            board.sample(progress.step, text)
        if names or signalled or late:
            job.save("latest", *(name for name in names if name != "latest"))
            saved = clock()

        bits = nats / LN2
        bar.set_postfix_str(f"loss {nats:.3f}, {bits:.3f} bpc, {job.rate:,.0f} chars/s", False)
        bar.update()
        board.step(progress.step, nats, val, rate, speed)
        if "latest" in names and run.writes:
            held = f"validation {val:.4f} nats, {val / LN2:.4f} bpc; " if val is not None else ""
            bar.write(
                f"step {progress.step:,} ({epoch:.2f} epochs, {progress.seconds:.0f} s): "
                f"{held}training {nats:.4f} nats, {bits:.4f} bpc; {job.rate:,.0f} chars/s"
            )
            run.plot(at_least_after=10.0)
            news.told()
        elif news.due():
            bar.write(f"step {progress.step:,}: loss {nats:.3f}, {job.rate:,.0f} chars/s")
            news.told()
        run.report(lambda: job.state("training"), at_least_after=REPORT_SECONDS)
        if signalled:
            return signalled
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    keep_freed_memory()
    cli.run("fastlstm.train", lambda: train(argv))


if __name__ == "__main__":
    main()
