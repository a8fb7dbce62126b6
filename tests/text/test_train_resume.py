"""A run that was stopped goes on, bit for bit, as if it had not been."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fork_server
import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file
from trainer import losses, refused, train, wait_for_step

from fastlstm.text import checkpoint
from fastlstm.text.data import corpus

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes that the tests start

TINY = [
    *("--hidden-size", "16", "--num-layers", "2", "--dropout", "0.2", "--device", "cpu"),
    *("--batch-size", "4", "--seq-length", "8", "--eval-every", "3", "--sample-every", "0"),
    *("--precision", "fp32"),  # whatever this processor is fast at
]


def assert_same_run(a, b):
    """Weights, optimizer, generators, carried state, progress and losses, in every checkpoint."""
    checkpoints = sorted(p.name for p in (a / "checkpoints").iterdir())
    assert checkpoints == sorted(p.name for p in (b / "checkpoints").iterdir())
    for name in checkpoints:
        x, y = a / "checkpoints" / name, b / "checkpoints" / name
        for file in ("model.safetensors", "training.safetensors"):
            assert (x / file).read_bytes() == (y / file).read_bytes(), (name, file)
        metas = [json.loads((folder / "meta.json").read_text()) for folder in (x, y)]
        for meta in metas:
            del meta["seconds"]
        assert metas[0] == metas[1]
    assert losses(a) == losses(b)


def start(*arguments, forked=True):
    """The command in a process of its own: a fork of a Python with torch, or a new Python."""
    words = ["-m", "fastlstm.train", *map(str, arguments)]
    options = {"cwd": Path(__file__).parents[2], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    if forked:
        return fork_server.start(*words, **options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], **pipes, **options)


def test_killed_runs_go_on_bit_for_bit(tmp_path, text):
    """SIGKILL at arbitrary moments, three times, of a run that saves every third step."""
    options = [*TINY, "--data", text, "--steps", "300", "--lr-schedule", "cosine", "--warmup", "9"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(*options, "--out", whole)
    process = start(*options, "--out", killed, forked=False)
    for target, pause in ((20, 0.0137), (90, 0.0071), (170, 0.0213)):
        wait_for_step(killed, target, process)
        time.sleep(pause)
        process.kill()
        process.communicate()
        assert target <= len(losses_until_torn(killed)) < 300
        process = start("--out", killed, "--resume")
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, (output, error)
    assert_same_run(whole, killed)


def losses_until_torn(run):
    """The whole lines of a killed run's metrics."""
    return [line for line in (run / "metrics.jsonl").read_text().split("\n")[:-1] if line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path, text, number):
    options = [*TINY, "--data", text, "--steps", "400", "--eval-every", "1000"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(*options, "--out", whole)
    process = start(*options, "--out", stopped, forked=number != signal.SIGINT)
    wait_for_step(stopped, 15, process)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert f"go on with: python -m fastlstm.train --out {stopped} --resume" in output
    meta = json.loads((stopped / "checkpoints" / "latest" / "meta.json").read_text())
    assert meta["step"] == len(losses(stopped)) < 400
    train("--out", stopped, "--resume")
    assert_same_run(whole, stopped)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--cell", "torch-lstm", "--dropout", "0"],
        ["--cell", "gru"],
        ["--cell", "rnn", "--num-layers", "1"],
        ["--optimizer", "rmsprop", "--precision", "bf16"],
        ["--optimizer", "adamw", "--lr-schedule", "step", "--val-fraction", "0"],
        ["--batch-size", "9", "--seq-length", "20"],  # several epochs, and stopped where one ends
    ],
)
def test_a_run_made_longer_equals_one_that_was_that_long(tmp_path, text, extra):
    options = [*TINY, "--data", text, *extra]
    train(*options, "--out", tmp_path / "whole", "--steps", 24)
    train(*options, "--out", tmp_path / "parts", "--steps", 12)
    train("--out", tmp_path / "parts", "--resume", "--steps", 24)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_any_checkpoint_in_the_place_of_latest_goes_on(tmp_path, text):
    options = [*TINY, "--data", text, "--eval-every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*options, "--out", whole, "--steps", 12)
    train(*options, "--out", parts, "--steps", 6)
    latest = parts / "checkpoints" / "latest"
    shutil.copytree(latest, tmp_path / "older")
    train("--out", parts, "--resume", "--steps", 9)
    shutil.rmtree(latest)
    shutil.copytree(tmp_path / "older", latest)
    train("--out", parts, "--resume", "--steps", 12)
    assert losses(whole)[-3:] == losses(parts)[-3:]
    for file in ("model.safetensors", "training.safetensors"):
        path = Path("checkpoints") / "latest" / file
        assert (whole / path).read_bytes() == (parts / path).read_bytes()


def test_a_run_that_knows_only_the_bytes_of_its_text_goes_on(tmp_path, text, monkeypatch):
    """As runs once did; their checkpoints have no place for other bytes."""
    with monkeypatch.context() as before:
        before.setattr(corpus.Corpus, "__post_init__", lambda self: self.read_as(self.occurring))
        train(*TINY, "--data", text, "--steps", 12, "--out", tmp_path / "whole")
        train(*TINY, "--data", text, "--steps", 6, "--out", tmp_path / "parts")
    train("--out", tmp_path / "parts", "--resume", "--steps", 12)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    meta = json.loads((tmp_path / "parts" / "checkpoints" / "latest" / "meta.json").read_text())
    assert bytes(meta["vocabulary"]) == bytes(sorted(set(text.read_bytes())))


def test_a_new_length_replaces_the_old_one(tmp_path, text):
    run = tmp_path / "run"
    train(*TINY, "--data", text, "--out", run, "--steps", 5, "--batch-size", 16)
    train("--out", run, "--resume", "--epochs", 1)
    config = json.loads((run / "config.json").read_text())
    assert (config["steps"], config["epochs"]) == (None, 1)
    assert losses(run)[-1][1] == 1
    train("--out", run, "--resume")  # already there: nothing happens
    assert losses(run)[-1][1] == 1


def test_a_run_on_a_text_too_short_to_hold_any_out_goes_on(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"a very short text indeed")
    options = ["--data", path, "--hidden-size", 8, "--seq-length", 4, "--device", "cpu"]
    train(*options, "--out", tmp_path / "whole", "--steps", 9)
    train(*options, "--out", tmp_path / "parts", "--steps", 5)
    train("--out", tmp_path / "parts", "--resume", "--steps", 9)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "parts")) == 9


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, text, capsys, monkeypatch):
    run = tmp_path / "run"
    train(*TINY, "--data", text, "--out", run, "--steps", 6)
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "No space left" in refused(capsys, "--out", run, "--resume", "--steps", 12)
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == before
    message = refused(capsys, *TINY, "--data", text, "--out", tmp_path / "new")
    assert "cannot write to" in message
    assert not (tmp_path / "new").exists()


def test_a_run_killed_before_config_json_is_none(tmp_path, text):
    """The checkpoint comes first, so that a run that exists can always be resumed."""
    run = tmp_path / "run"
    train(*TINY, "--data", text, "--out", run, "--steps", 4)
    (run / "config.json").unlink()
    (run / "metrics.jsonl").write_text("")  # it had not begun
    train(*TINY, "--data", text, "--out", run, "--steps", 2)
    assert len(losses(run)) == 2


def test_the_torn_last_line_of_a_killed_run_is_dropped(tmp_path, text):
    run = tmp_path / "run"
    train(*TINY, "--data", text, "--out", run, "--steps", 6)
    before = losses(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 7, "train_loss": 1.0, "val_loss": None}) + '\n{"step": 8, "t'
        )
    train("--out", run, "--resume")
    assert losses(run) == before


@pytest.fixture
def stopped(tmp_path, text):
    train(*TINY, "--data", text, "--out", tmp_path / "run", "--steps", 6)
    return tmp_path / "run"


def test_what_would_make_it_another_run_is_refused(stopped, text, capsys):
    before = (stopped / "config.json").read_bytes()
    for flag, value, message in (
        ("--hidden-size", 17, "--hidden-size 17 disagrees with the run to resume, which has 16"),
        ("--batch-size", 5, "--batch-size 5 disagrees"),
        ("--seed", 1, "--seed 1 disagrees"),
        ("--preset", "karpathy", "disagrees"),
        ("--data", __file__, "the text is not the one that"),
    ):
        assert message in refused(capsys, "--out", stopped, "--resume", flag, value)
    assert (stopped / "config.json").read_bytes() == before
    same = ["--hidden-size", 16, "--data", text.parent / "*.txt"]  # other words for the same
    train("--out", stopped, "--resume", "--steps", 7, "--lr", 1e-4, *same)
    assert len(losses(stopped)) == 7
    text.write_text(text.read_text() + "more")
    assert "the text is not" in refused(capsys, "--out", stopped, "--resume", "--steps", 9)


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGES = {
    "config": lambda run, at: (run / "config.json").write_text("{"),
    "config type": lambda run, at: change_json(run / "config.json", hidden_size="x"),
    "config name": lambda run, at: change_json(run / "config.json", surprise=1),
    "config list": lambda run, at: (run / "config.json").write_text("[]"),
    "no checkpoint": lambda run, at: at.rename(run / "elsewhere"),
    "step": lambda run, at: change_json(at / "meta.json", step=-1),
    "position": lambda run, at: change_json(at / "meta.json", position=10**6),
    "seconds": lambda run, at: change_json(at / "meta.json", seconds="x"),
    "endless seconds": lambda run, at: change_json(at / "meta.json", seconds=math.inf),
    "best": lambda run, at: change_json(at / "meta.json", best=[]),
    "no best": lambda run, at: change_json(at / "meta.json", best=math.nan),
    "vocabulary": lambda run, at: change_json(at / "meta.json", vocabulary=[1]),
    "weights": lambda run, at: os.truncate(at / "model.safetensors", 300),
    "training": lambda run, at: os.truncate(at / "training.safetensors", 300),
    "generator": lambda run, at: change_tensors(
        at / "training.safetensors", lambda t: t.update({"rng.cpu": torch.zeros(3)})
    ),
    "no generator": lambda run, at: change_tensors(
        at / "training.safetensors", lambda t: t.pop("rng.cpu")
    ),
    "state": lambda run, at: change_tensors(
        at / "training.safetensors", lambda t: t.update({"state.0": torch.zeros(2, 1, 16)})
    ),
    "half a state": lambda run, at: change_tensors(
        at / "training.safetensors", lambda t: t.pop("state.1")
    ),
    "optimizer": lambda run, at: change_tensors(
        at / "training.safetensors", lambda t: t.update({"optimizer.0.exp_avg": torch.zeros(1)})
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_refused_and_left_alone(stopped, name, capsys):
    DAMAGES[name](stopped, stopped / "checkpoints" / "latest")
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    message = refused(capsys, "--out", stopped, "--resume", "--steps", 9)
    assert "config" in message if name.startswith("config") else "checkpoint" in message
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before
