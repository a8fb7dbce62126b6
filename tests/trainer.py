"""What the tests of ``python -m fastlstm.train`` share."""

import json
import time

import pytest

from fastlstm.train import main

# That a tiny model learns in seconds.
TEXT = "".join(f"{j} and {j * 7919 % 97}, the quick brown fox\n" for j in range(60))
TINY = [
    *("--hidden-size", "16", "--num-layers", "2", "--dropout", "0.2", "--device", "cpu"),
    *("--batch-size", "4", "--seq-length", "8", "--eval-every", "5", "--sample-every", "0"),
    *("--precision", "fp32"),  # whatever this processor is fast at
]


def train(*arguments):
    main([str(a) for a in arguments])


def train_tiny(run, text, *arguments):
    """Train a tiny model; the lines of its log."""
    train(*TINY, "--data", text, "--out", run, *arguments)
    return metrics(run)


def metrics(run):
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    """What tells one run from another, step by step."""
    names = ("step", "epoch", "train_loss", "val_loss", "bpc")
    return [tuple(line[name] for name in names) for line in metrics(run)]


def refused(capsys, *arguments):
    """The one line that a mistake gives."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        train(*arguments)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def wait_for_step(run, step, process, seconds=90):
    """Until the process has logged a step."""
    deadline = time.monotonic() + seconds
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.002)
