"""When the trainer saves, and what a run that goes wrong leaves."""

import errno
import itertools
import json
import math
import re
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("safetensors")

from trainer import TINY, refused, train_tiny

from fastlstm.text import checkpoint, cli
from fastlstm.text import model as models
from fastlstm.text.opening import load_model
from fastlstm.text.training import records, screen

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(sentences):
    return sentences


def test_many_short_epochs_leave_few_checkpoints(tmp_path, text):
    train_tiny(tmp_path / "run", text, "--steps", 90, "--batch-size", 40, "--seq-length", 100,
          "--eval-every", 1000)  # fmt: skip
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("epoch-*"))
    assert 10 <= len(kept) <= 20


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path, text, capsys, monkeypatch):
    """Neither the loss nor the gradient may reach weights that are then stored."""
    for kind in ("loss", "gradient"):
        calls = []

        def broken(logits, target, calls=calls, kind=kind):
            calls.append(1)
            loss = models.F.cross_entropy(logits.flatten(0, 1), target.flatten())
            if len(calls) <= 12:
                return loss
            if kind == "loss":
                return loss * math.nan
            return loss + (0 * logits.sum()).sqrt()  # 0, with a gradient of 0 times infinity

        monkeypatch.setattr(models, "loss_nats", broken)
        run = tmp_path / kind
        with pytest.raises(SystemExit) as error:
            train_tiny(run, text, "--val-fraction", 0, "--steps", 30, "--eval-every", 12)
        assert error.value.code == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert re.search(r"of step 13, .* is no number to learn from: stopped", message)
        assert "--lr" in message
        _, _, meta = load_model(run, "latest")
        assert meta["step"] == 12


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, text, capsys):
    """After the last step no loss tells."""
    with pytest.raises(SystemExit) as error:
        train_tiny(tmp_path / "run", text, "--val-fraction", 0, "--steps", 1, "--lr", 1e300)
    assert error.value.code == 1
    assert "a weight after step 1 is no finite number: stopped" in capsys.readouterr().err
    assert load_model(tmp_path / "run", "latest")[2]["step"] == 0


def test_latest_is_written_last(tmp_path, text, monkeypatch):
    """Who resumes from an older latest writes the others again; a newer one would hide a gap."""
    written = []
    real = checkpoint.save

    def save(folder, *arguments):
        written.append(folder.name)
        real(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    train_tiny(tmp_path / "run", text, "--epochs", 1, "--batch-size", 16, "--lr", 1e-2)
    assert {"latest", "best", "epoch-1"} == set(written)
    assert written[0] == "latest"
    for name, after in itertools.pairwise(written):
        assert name == "latest" or after in ("latest", "best")
        assert name != "best" or after in ("latest", "epoch-1")
    assert written[-1] == "latest"


def test_a_long_time_without_an_evaluation_saves_too(tmp_path, text, monkeypatch):
    monkeypatch.setattr("fastlstm.train.SAVE_SECONDS", 0.0)

    def broken(logits, target, calls=[]):  # noqa: B006
        calls.append(1)
        loss = models.F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return loss * (math.nan if len(calls) > 6 else 1)

    monkeypatch.setattr(models, "loss_nats", broken)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", text, "--steps", 10, "--eval-every", 1000)
    assert load_model(tmp_path / "run", "latest")[2]["step"] == 6


@pytest.mark.parametrize("left", [BrokenPipeError(), OSError(errno.EIO, "Input/output error")])
def test_whoever_stops_reading_the_output_costs_no_step(tmp_path, text, monkeypatch, left):
    shown = []

    def show(self, job, step):
        shown.append(job.progress.step)
        if len(shown) == 7:
            raise left

    monkeypatch.setattr(screen.Screen, "show", show)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    with nullcontext() if isinstance(left, BrokenPipeError) else pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", text, "--steps", 20, "--eval-every", 100)
    assert load_model(tmp_path / "run", "latest")[2]["step"] == 7
    assert "whoever read its output has left" in (tmp_path / "run" / "report.html").read_text()


DAMAGES = {
    "garbage": "\0" * 90,
    "torn": '{"step": 3, "train_',
    "no loss": '{"step": 3, "train_loss": NaN, "val_loss": null}',
    "endless loss": '{"step": 3, "train_loss": 1, "val_loss": 1e999}',
    "huge step": '{"step": -1%s, "train_loss": 1, "val_loss": null}' % ("0" * 30),
    "nested": "[" * 100_000,
}


def test_lines_behind_a_damaged_one_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = '{{"step": {}, "train_loss": 2.5, "val_loss": null}}\n'
    path.write_text(line.format(1) + "\n".join([*DAMAGES.values(), ""]) + line.format(4))
    looking, writing = records.Metrics(path, writes=False), records.Metrics(path)
    looking.look()
    writing.keep_until(9)
    assert list(looking.steps) == list(writing.steps) == [1, 4]
    assert [json.loads(kept)["step"] for kept in path.read_text().splitlines()] == [1, 4]


NO_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 B"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nframe #0: ..."),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["CPU", "GPU", "Python"])
def test_a_step_that_memory_does_not_hold_is_one_line(tmp_path, text, capsys, monkeypatch, error):
    real = models.loss_nats
    for number in (1, 9):
        steps = itertools.count(1)

        def loss_nats(logits, target, steps=steps, number=number):
            if next(steps) == number:
                raise error
            return real(logits, target)

        monkeypatch.setattr(models, "loss_nats", loss_nats)
        run = tmp_path / str(number)
        arguments = (*TINY, "--data", text, "--out", run, "--steps", 20, "--eval-every", 4,
                     "--val-fraction", 0)  # fmt: skip
        line = refused(capsys, *arguments)
        assert "out of memory: " in line
        assert line.endswith(
            "; a smaller --batch-size, --seq-length or --hidden-size takes less\n"
            if number == 1 else f"; {run} keeps its last checkpoint\n"
        )  # fmt: skip
        assert run.exists() is (number > 1)  # where nothing was trained, --out can be given again
    assert load_model(run, "latest")[2]["step"] == 8
