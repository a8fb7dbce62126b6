"""Train a character-level language model: ``python -m fastlstm.train``.

The loop at the end of this file is the whole method: windows of text in order, the state carried
from one to the next with its gradient cut (truncated backpropagation through time), cross-entropy,
clipping, an optimizer step; now and then an evaluation, a checkpoint and a sample.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .text import UserError, cli

if TYPE_CHECKING:  # they import what only the trainer needs: see `main`
    from .text.corpus import Corpus, Streams
    from .text.model import CharModel
    from .text.options import Config
    from .text.run import Progress, Run

EVAL_STREAMS = 64  # wide, so that evaluating is fast
EVAL_CHARACTERS = 1 << 17  # spread over the whole held-out tail; more would cost minutes of a run
EPOCH_CHECKPOINTS = 20  # at most, evenly spread: short texts have thousands of epochs
SAVE_SECONDS = 60.0  # of work that a killed run may lose
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def make_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "rmsprop":  # char-rnn's decay
        return torch.optim.RMSprop(model.parameters(), lr=config.lr, alpha=0.95)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=config.lr, fused=True)


def pick_device(name: str, precision: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # a device may be named and still not be there
    except Exception as error:  # torch raises many kinds here
        raise UserError(f"--device: {name} is not available here") from error
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        raise UserError(f"--precision {precision} needs a GPU; a CPU has fp32 and bf16")
    return device


def split(corpus: Corpus, config: Config, given: set[str]) -> dict[str, Streams]:
    """Training, validation and test streams; a default batch shrinks to fit a short text.

    Raises:
        UserError: there is too little text for one batch, or for a part that was asked for.
    """
    from .text.corpus import Streams

    size, steps = len(corpus.data), config.seq_length
    val, test = int(size * config.val_fraction), int(size * config.test_fraction)
    train = size - val - test
    if "batch_size" not in given:
        config.batch_size = max(1, min(config.batch_size, (train - 1) // steps))
    streams = {"train": Streams(corpus, 0, train, config.batch_size, steps)}
    if streams["train"].windows == 0:
        raise UserError(
            f"the text is shorter than one batch: {config.batch_size} streams of {steps} "
            f"characters need {config.batch_size * steps + 1} bytes to train on, there are {train}"
        )
    for name, begin, length in (("val", train, val), ("test", train + val, test)):
        if length < 2:
            if f"{name}_fraction" in given and getattr(config, f"{name}_fraction") > 0:
                raise UserError(f"--{name}-fraction leaves {length} bytes of the text: too few")
            continue
        batch = max(1, min(EVAL_STREAMS, (length - 1) // steps))
        streams[name] = Streams(corpus, begin, begin + length, batch, steps, partial=True)
    if "val" in streams:
        few = max(1, EVAL_CHARACTERS // (streams["val"].batch * steps))
        streams["val"].windows = min(streams["val"].windows, few)
    return streams


@dataclass
class Job:
    """All that the training loop works on."""

    config: Config
    run: Run
    streams: dict[str, Streams]
    device: torch.device
    model: CharModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meta: dict[str, Any]  # of its checkpoints: vocabulary and architecture
    progress: Progress
    hx: Any = None  # the state carried from the window before

    def save(self, *names: str) -> None:
        self.progress.scaler = self.scaler.state_dict() or None
        meta = {**self.meta, **asdict(self.progress)}
        self.run.save(list(names), self.model, self.optimizer, self.hx, meta)

    def autocast(self) -> torch.autocast:
        """bf16 and fp16: the multiplications in half precision, weights and optimizer in fp32."""
        low = LOW.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=low, enabled=low is not None)

    def evaluate(self, name: str) -> float:
        from .text.model import evaluate

        with self.autocast():
            return evaluate(self.model, self.streams[name], self.device)

    def sample(self, length: int) -> str:
        from .text.sampling import sample_text

        return sample_text(self.model, self.meta["vocabulary"], length, self.config.seed)


def prepare(argv: Sequence[str] | None) -> Job:
    """Everything before the first step: options, text, model, and the run's folder."""
    from .text import corpus, model, options
    from .text.run import Progress, Run, free_folder, load_model

    request = options.parse(argv, torch.cuda.is_available())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training on several processes is not available yet")
    config, given, sha256 = request.config, request.given, None
    out = Path(request.out) if request.out else free_folder(corpus.slug(config.data))
    run = Run(out)
    if request.resume:
        stored, sha256 = run.read_config()
        config = options.resumed(request, stored, f"{out}/config.json")
        given = given | {"batch_size"}  # whatever it was shrunk to then
    else:
        run.refuse_taken()
    device = pick_device(config.device, config.precision)
    other = None
    if request.init_from:
        other, other_vocabulary, found = load_model(Path(request.init_from), "best")
        for name in ("cell", "hidden_size", "num_layers"):
            theirs = found["model"][name]
            same = {getattr(config, name), theirs} <= {"lstm", "torch-lstm"}  # the same weights
            if name in given and not same and getattr(config, name) != theirs:
                raise UserError(f"--init-from: {request.init_from} has {name} {theirs}")
            if not (name in given and same):
                setattr(config, name, theirs)

    text = corpus.load(config.data)
    if sha256 not in (None, text.sha256):
        raise UserError(f"--resume: the text is not the one that {out} was trained on")
    streams = split(text, config, given)
    meta: dict[str, Any] = {
        "unit": config.unit,
        "vocabulary": text.vocabulary,
        "model": {name: getattr(config, name) for name in model.ARCHITECTURE},
    }
    torch.manual_seed(config.seed)
    try:
        net = model.CharModel(len(text.vocabulary), **meta["model"]).to(device)
    except RuntimeError as error:  # whatever torch says when memory runs out
        raise UserError(f"the model does not fit: {str(error).splitlines()[0]}") from error
    if other is not None:
        model.adopt(net, text.vocabulary, other, other_vocabulary)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    optimizer = make_optimizer(config, net)
    job = Job(config, run, streams, device, net, optimizer, scaler, meta, Progress())
    if request.resume:
        job.hx, found = run.restore(net, optimizer, config.batch_size, meta)
        try:
            job.progress = Progress.read(found, streams["train"].windows)
            if job.progress.scaler:
                scaler.load_state_dict(job.progress.scaler)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"the checkpoint latest of {out} is damaged: {error}") from error
        run.metrics.keep_until(job.progress.step)
        run.write_config(config, text.sha256)
    else:
        run.begin(config, text.sha256, lambda: job.save("latest"))
    return job


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


def train(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    import matplotlib  # noqa: F401  missing it should not show after an hour
    from tqdm import tqdm

    from .text.model import detached, loss_nats

    job = prepare(argv)
    config, progress, model, run = job.config, job.progress, job.model, job.run
    data, device = job.streams["train"], job.device
    total = min(
        *([config.steps] if config.steps else []),
        *([config.epochs * data.windows] if config.epochs else []),
        sys.maxsize,
    )
    epoch_every = -(-total // (data.windows * EPOCH_CHECKPOINTS))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    again = f"python -m fastlstm.train --out {shlex.quote(str(run.folder))} --resume"
    print(
        f"{run.folder}: {config.num_layers}x{config.hidden_size} {config.cell}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.precision} on "
        f"{device}\n{len(data.corpus.data):,} bytes of text, {len(job.meta['vocabulary'])} "
        f"different ones; {total:,} steps of {config.batch_size} x {config.seq_length}, "
        f"{total / data.windows:.2f} epochs"
    )

    def diverged(what: str) -> int:
        bar.close()
        run.plot()
        print(
            f"fastlstm.train: {what} at step {progress.step + 1:,} is no number to learn from: "
            f"stopped. {run.folder} keeps its checkpoints; try a lower --lr or --clip-norm, or "
            "--precision fp32",
            file=sys.stderr,
        )
        return 1

    clock = time.monotonic
    begun, saved, rate = clock() - progress.seconds, clock(), 0.0
    model.train()
    # Without a terminal there is no bar; the lines that evaluations print are enough for a log.
    bar = tqdm(total=total, initial=progress.step, unit="step", disable=None, dynamic_ncols=True)
    with bar, Interrupts() as interrupts:
        while progress.step < total and not 0 < config.patience <= progress.worse:
            started = clock()
            x, y = data.window(progress.position)
            for group in job.optimizer.param_groups:
                group["lr"] = learning_rate(config, progress.step, total, progress.epoch)
            with job.autocast():
                logits, hx = model(x.to(device), job.hx)
                loss = loss_nats(logits, y.to(device))
            job.optimizer.zero_grad(set_to_none=True)
            job.scaler.scale(loss).backward()
            job.scaler.unscale_(job.optimizer)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            nats = loss.item()
            unscaled = job.scaler.is_enabled() or bool(norm.isfinite())
            if not (math.isfinite(nats) and unscaled):  # before it reaches the weights
                return diverged(f"the loss {nats:.3g} with a gradient of norm {norm:.3g}")
            if config.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip_norm, norm)
            job.scaler.step(job.optimizer)
            job.scaler.update()

            job.hx = detached(hx)
            progress.step += 1
            progress.position += 1
            epoch = progress.epoch + progress.position / data.windows
            speed = x.numel() / (clock() - started)
            rate = 0.9 * rate + 0.1 * speed if rate else speed
            names = []
            if progress.position == data.windows:  # the next epoch begins with an empty memory
                progress.epoch, progress.position, job.hx = progress.epoch + 1, 0, None
                names += [f"epoch-{progress.epoch}"] if progress.epoch % epoch_every == 0 else []
            ended = progress.step == total
            val = None
            if ended or progress.step % config.eval_every == 0:
                names += ["latest"]
                if "val" in job.streams:
                    val = job.evaluate("val")
                    if not math.isfinite(val):
                        return diverged(f"the validation loss {val}")
                    better = progress.best is None or val < progress.best
                    progress.best = val if better else progress.best
                    progress.worse = 0 if better else progress.worse + 1
                    names += ["best"] if better else []
            progress.seconds = clock() - begun
            run.metrics.log(progress.step, epoch, nats, val, speed, progress.seconds)
            if names or interrupts.number or clock() - saved > SAVE_SECONDS:
                job.save("latest", *(name for name in names if name != "latest"))
                saved = clock()

            bits = nats / math.log(2)
            bar.set_postfix_str(f"loss {nats:.3f}, {bits:.3f} bpc, {rate:,.0f} chars/s", False)
            bar.update()
            if "latest" in names:
                held = (
                    f"validation {val:.4f} nats, {val / math.log(2):.4f} bpc; "
                    if val is not None
                    else ""
                )
                bar.write(
                    f"step {progress.step:,} ({epoch:.2f} epochs, {progress.seconds:.0f} s): "
                    f"{held}training {nats:.4f} nats, {bits:.4f} bpc; {rate:,.0f} chars/s"
                )
                run.plot(at_least_after=10.0)
            if config.sample_every and (progress.step % config.sample_every == 0 or ended):
                bar.write(f"{'':-<72}\n{job.sample(400)}\n{'':-<72}")
            if interrupts.number:
                break

    run.metrics.close()
    run.plot()
    if interrupts.number:
        print(f"\nstopped and saved at step {progress.step:,}; go on with: {again}")
        return 128 + interrupts.number
    if 0 < config.patience <= progress.worse:
        print(f"no better validation loss in {config.patience} evaluations: stopped")
    if "test" in job.streams:
        test = job.evaluate("test")
        print(f"test: {test:.4f} nats, {test / math.log(2):.4f} bits a character")
    best = ""
    if progress.best is not None:
        best = f"; best validation {progress.best:.4f} nats, {progress.best / math.log(2):.4f} bpc"
    print(
        f"{progress.step:,} steps in {progress.seconds:.0f} s{best}\n"
        f"sample:  python -m fastlstm.sample {shlex.quote(str(run.folder))} -n 1000\n"
        f"go on:   {again} --steps {2 * progress.step}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    keep_freed_memory()
    cli.run("fastlstm.train", lambda: train(argv))


if __name__ == "__main__":
    main()
