"""Train a character-level language model: ``python -m fastlstm.train``."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .text import UserError


def keep_freed_memory() -> None:
    """Stop glibc from giving pages back between steps, which costs a tenth of a step on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


def pick_device(name: str, precision: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises AssertionError and RuntimeError kinds here
        raise UserError(f"--device: {name} is not available here") from error
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        raise UserError(f"--precision {precision} needs a GPU; fp32 and bf16 run on a CPU")
    return device


def learning_rate(config: Any, step: int, total: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then the schedule."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, total - config.warmup)
    if config.lr_schedule == "cosine":  # down to a tenth
        return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))
    if config.lr_schedule == "step":  # halved after every fifth of the run
        return config.lr * 0.5 ** int(done * 5)
    return config.lr


def make_optimizer(config: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "rmsprop":  # char-rnn's decay
        return torch.optim.RMSprop(model.parameters(), lr=config.lr, alpha=0.95)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=config.lr)


def split(corpus: Any, config: Any, may_shrink: bool) -> dict[str, Any]:
    """Training, validation and test streams; the batch shrinks for a short text if it may."""
    from .text.corpus import Streams

    n = len(corpus.data)
    test = int(n * config.test_fraction)
    val = int(n * config.val_fraction)
    train = n - val - test
    need = config.batch_size * config.seq_length + 1
    if train < need and may_shrink:
        config.batch_size = max(1, (train - 1) // config.seq_length)
        need = config.batch_size * config.seq_length + 1
    if train < need:
        raise UserError(
            f"the corpus is shorter than one batch: {config.batch_size} streams of "
            f"{config.seq_length} characters need {need} bytes to train on, there are {train}"
        )
    streams = {"train": Streams(corpus, 0, train, config.batch_size, config.seq_length)}
    for name, begin, end in (("val", train, train + val), ("test", train + val, n)):
        batch = min(config.batch_size, max(1, (end - begin - 1) // config.seq_length))
        part = Streams(corpus, begin, end, batch, config.seq_length)
        if part.windows > 0:
            streams[name] = part
        elif end > begin:
            raise UserError(
                f"the {name} part has {end - begin} bytes, less than one window of "
                f"{config.seq_length + 1}; raise --{name}-fraction or set it to 0"
            )
    return streams


def prepare(argv: Sequence[str] | None) -> Any:
    """Everything before the first step: options, corpus, model, and the run's folder."""
    from .text import checkpoint, corpus, options
    from .text.run import Run, build_model, free_folder, load_model, load_weights

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training on several processes is not available yet")
    config, given, arguments = options.parse(argv, torch.cuda.is_available())
    if arguments.compile:
        raise UserError("--compile is not available yet")
    if arguments.resume and arguments.out is None:
        raise UserError("--resume needs --out RUN, the run to go on with")
    run = Run(Path(arguments.out) if arguments.out else free_folder())
    sha256 = None
    if arguments.resume:
        stored, sha256 = run.read_config()
        stored = options.checked(stored, str(run.folder / "config.json"))
        for name in sorted(given):
            if name in options.FIXED and stored.get(name) != getattr(config, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag}: the run in {run.folder} has {stored.get(name)!r}, "
                    f"got {getattr(config, name)!r}; --resume cannot change it"
                )
        mine = {name: getattr(config, name) for name in given}
        config = options.Config(**{**stored, **mine})
    device = pick_device(config.device, config.precision)
    text = corpus.load(config.data)
    if sha256 is not None and text.sha256 != sha256:
        raise UserError("--resume: the corpus is not the one that the run began with")
    may_shrink = not arguments.resume and "batch_size" not in given
    streams = split(text, config, may_shrink)
    torch.manual_seed(config.seed)
    meta = {
        "vocabulary": text.vocabulary,
        "model": {k: getattr(config, k) for k in ("cell", "hidden_size", "num_layers", "dropout")},
        "unit": config.unit,
    }
    model = build_model(meta).to(device)
    if arguments.init_from and not arguments.resume:
        other, vocabulary, _ = load_model(Path(arguments.init_from), "best")
        if vocabulary != text.vocabulary:
            raise UserError("--init-from: that run's vocabulary is not this corpus's")
        load_weights(model, other.state_dict(), arguments.init_from)
    optimizer = make_optimizer(config, model)
    progress: dict[str, Any] = {
        "step": 0, "position": 0, "epoch": 0, "best": None, "worse": 0, "seconds": 0.0,
        "scaler": None,
    }  # fmt: skip
    hx = None
    if not arguments.resume:
        run.start(config, text.sha256)
    elif (run.folder / "checkpoints").is_dir() and any((run.folder / "checkpoints").iterdir()):
        hx, found = run.restore(model, optimizer)
        progress = {key: found.get(key, value) for key, value in progress.items()}
        run.cut_metrics(progress["step"])
        written = {**asdict(config), "data_sha256": text.sha256}
        checkpoint.write_text(
            run.folder / "config.json", checkpoint.json.dumps(written, indent=2) + "\n"
        )
    else:
        run.cut_metrics(0)  # killed before its first checkpoint: from the start
    return config, run, streams, model, optimizer, hx, meta, progress, device


def train(argv: Sequence[str] | None = None) -> None:
    from tqdm import tqdm

    from .text.model import detached, evaluate, loss_nats
    from .text.sampling import sample_text

    config, run, streams, model, optimizer, hx, meta, progress, device = prepare(argv)
    data = streams["train"]
    limits = [config.steps] if config.steps else []
    limits += [config.epochs * data.windows] if config.epochs else []
    total = min(limits)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    if progress["scaler"]:
        scaler.load_state_dict(progress["scaler"])
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{run.folder}: {config.num_layers}x{config.hidden_size} {config.cell}, "
        f"{parameters:,} parameters on {device}; {len(data.corpus.data):,} bytes of text, "
        f"{len(meta['vocabulary'])} characters; {total:,} steps of {config.batch_size} x "
        f"{config.seq_length}, {total / data.windows:.2f} epochs"
    )
    quoted = f"python -m fastlstm.train --out {run.folder} --resume"

    def save(*names: str) -> None:
        found = {**meta, **progress, "scaler": scaler.state_dict() or None}
        for name in names:
            run.save(name, model, optimizer, hx, found)

    begun = time.monotonic() - progress["seconds"]
    first = progress["step"]
    model.train()
    # Without a terminal the bar would only fill a log.
    bar = tqdm(total=total, initial=first, unit="step", disable=None, dynamic_ncols=True)
    try:
        while progress["step"] < total:
            started = time.monotonic()
            x, y = data.window(progress["position"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, progress["step"], total)
            with torch.autocast(device.type, dtype=low, enabled=low is not None):
                logits, new_hx = model(x.to(device), hx)
                loss = loss_nats(logits, y.to(device))
            nats = loss.item()
            if not math.isfinite(nats):
                bar.close()
                print(
                    f"the loss is {nats} at step {progress['step'] + 1}: stopped. The last "
                    "checkpoint is kept; try a lower --lr or --clip-norm, or --precision fp32",
                    file=sys.stderr,
                )
                raise SystemExit(1)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if config.clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            hx = detached(new_hx)
            progress["step"] += 1
            progress["position"] += 1
            speed = x.numel() / (time.monotonic() - started)
            epoch_ended = progress["position"] == data.windows
            if epoch_ended:
                progress["position"], hx = 0, None
                progress["epoch"] += 1
            ended = progress["step"] == total
            evaluated = ended or progress["step"] % config.eval_every == 0
            val = (
                evaluate(model, streams["val"], device) if evaluated and "val" in streams else None
            )
            progress["seconds"] = time.monotonic() - begun
            run.log(
                step=progress["step"],
                epoch=(progress["epoch"] + progress["position"] / data.windows),
                train_loss=nats,
                val_loss=val,
                chars_per_second=speed,
                seconds=progress["seconds"],
            )
            bar.update()
            bar.set_postfix_str(f"loss {nats:.3f}, {nats / math.log(2):.3f} bpc, {speed:,.0f} ch/s")
            names = ["latest"] if evaluated else []
            if val is not None:
                better = progress["best"] is None or val < progress["best"]
                progress["best"] = val if better else progress["best"]
                progress["worse"] = 0 if better else progress["worse"] + 1
                names += ["best"] if better else []
                bar.write(
                    f"step {progress['step']}: validation {val:.4f} nats, "
                    f"{val / math.log(2):.4f} bits a character"
                )
            if epoch_ended:
                names += [f"epoch-{progress['epoch']}"]
            save(*names)
            if evaluated:
                run.plot(at_least_after=10.0)
            if config.sample_every and (progress["step"] % config.sample_every == 0 or ended):
                bar.write("-" * 72)
                bar.write(sample_text(model, meta["vocabulary"], 400, config.seed))
                bar.write("-" * 72)
            if config.patience and progress["worse"] >= config.patience:
                bar.write(f"no better validation loss in {config.patience} evaluations: stopped")
                break
    except KeyboardInterrupt:
        bar.close()
        save("latest")
        run.plot()
        print(f"\nsaved at step {progress['step']}; go on with: {quoted}")
        raise SystemExit(130) from None
    bar.close()
    save("latest")
    run.plot()
    if "test" in streams:
        test = evaluate(model, streams["test"], device)
        print(f"test: {test:.4f} nats, {test / math.log(2):.4f} bits a character")
    best = f", best validation {progress['best'] / math.log(2):.4f} bits a character"
    print(
        f"{progress['step']} steps in {progress['seconds']:.0f} s"
        + (best if progress["best"] is not None else "")
        + f"\nsample:   python -m fastlstm.sample {run.folder} -n 1000"
        + f"\ncontinue: {quoted} --steps {2 * total}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    keep_freed_memory()
    if hasattr(sys.stdout, "reconfigure"):  # a log file should show how far the run is
        sys.stdout.reconfigure(line_buffering=True)
    try:
        train(argv)
    except UserError as error:
        print(f"fastlstm.train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ImportError as error:
        if error.name and error.name.split(".")[0] in (
            "numpy", "safetensors", "tqdm", "matplotlib", "pooch",
        ):  # fmt: skip
            print(
                f"fastlstm.train: {error.name} is not installed: pip install 'fastlstm[text]'",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        raise


if __name__ == "__main__":
    main()
