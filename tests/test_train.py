"""The trainer: it learns, its files are whole, and a stopped run goes on bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file

from fastlstm.text import UserError, corpus
from fastlstm.train import learning_rate, main

TINY = [
    *("--hidden-size", "16", "--num-layers", "2", "--dropout", "0.2", "--device", "cpu"),
    *("--batch-size", "4", "--seq-length", "8", "--warmup", "2"),
    *("--eval-every", "5", "--sample-every", "0"),
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"line {j}: the quick brown fox, {j * 7919 % 97}\n" for j in range(300))
    )
    return path


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(m["step"], m["train_loss"], m["val_loss"]) for m in read_metrics(run)]


def assert_same_run(a, b):
    """Weights, optimizer, generators and carried state, bit for bit; and the losses."""
    for name in ("model", "training"):
        x, y = (load_file(run / "checkpoints" / "latest" / f"{name}.safetensors") for run in (a, b))
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), key
    assert losses(a) == losses(b)


def command(*arguments):
    return [sys.executable, "-m", "fastlstm.train", *map(str, arguments)]


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_learns_and_leaves_the_files_that_the_design_names(tmp_path, text, capsys):
    run = tmp_path / "run"
    main([*TINY, "--data", str(text), "--out", str(run), "--epochs", "2", "--lr", "1e-2",
          "--sample-every", "100"])  # fmt: skip
    metrics = read_metrics(run)
    assert metrics[-1]["val_loss"] < metrics[0]["train_loss"] - 1
    assert list(metrics[0]) == [
        "step", "epoch", "train_loss", "val_loss", "chars_per_second", "seconds", "bpc",
    ]  # fmt: skip
    assert metrics[0]["bpc"] == pytest.approx(metrics[0]["train_loss"] / math.log(2))
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "loss.png",
    }  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "latest", "best", "epoch-1", "epoch-2",
    }  # fmt: skip
    for folder in (run / "checkpoints").iterdir():
        assert {p.name for p in folder.iterdir()} == {
            "model.safetensors", "training.safetensors", "meta.json",
        }  # fmt: skip
    assert "python -m fastlstm.sample" in capsys.readouterr().out


def test_killed_run_goes_on_bit_for_bit(tmp_path, text):
    """SIGKILL at arbitrary moments, several times, while checkpoints are written every step."""
    options = [
        *TINY,
        "--data",
        text,
        "--steps",
        "400",
        "--eval-every",
        "2",
        "--val-fraction",
        "0.01",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main([*map(str, options), "--out", str(whole)])
    process = start(*options, "--out", killed)
    wait_for(killed / "checkpoints" / "latest", process)
    time.sleep(0.317)
    process.kill()
    process.wait()
    done = read_metrics(killed)[-1]["step"]
    assert 0 < done < 400
    process = start("--out", killed, "--resume")
    while process.poll() is None and len(losses(killed)) <= done:
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.wait()
    main(["--out", str(killed), "--resume"])
    assert_same_run(whole, killed)


def test_interrupt_saves_and_says_how_to_go_on(tmp_path, text):
    options = [*TINY, "--data", text, "--steps", "300"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main([*map(str, options), "--out", str(whole)])
    process = start(*options, "--out", stopped)
    wait_for(stopped / "checkpoints" / "latest", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"python -m fastlstm.train --out {stopped} --resume" in output
    main(["--out", str(stopped), "--resume"])
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("cell", ["torch-lstm", "gru", "rnn"])
def test_other_cells_train_and_resume(tmp_path, text, cell):
    options = [*TINY, "--data", str(text), "--cell", cell, "--lr-schedule", "constant"]
    main([*options, "--out", str(tmp_path / "a"), "--steps", "10"])
    main([*options, "--out", str(tmp_path / "b"), "--steps", "5"])
    main(["--out", str(tmp_path / "b"), "--resume", "--steps", "10"])
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_lstm_follows_torchs_lstm(tmp_path, text):
    """Same seed, same steps: the same losses to the accuracy of float32."""
    for cell in ("lstm", "torch-lstm"):
        main([*TINY, "--dropout", "0", "--data", str(text), "--cell", cell, "--steps", "50",
              "--out", str(tmp_path / cell)])  # fmt: skip
    for ours, theirs in zip(
        read_metrics(tmp_path / "lstm"), read_metrics(tmp_path / "torch-lstm"), strict=True
    ):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimizers_and_precisions(tmp_path, text, optimizer, precision):
    main([*TINY, "--data", str(text), "--out", str(tmp_path / "run"), "--optimizer", optimizer,
          "--precision", precision, "--steps", "100", "--lr", "2e-2",
          "--eval-every", "50"])  # fmt: skip
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] - 0.5


def test_init_from_another_run(tmp_path, text):
    main([*TINY, "--data", str(text), "--out", str(tmp_path / "a"), "--epochs", "3"])
    main([*TINY, "--data", str(text), "--out", str(tmp_path / "b"), "--steps", "1",
          "--init-from", str(tmp_path / "a")])  # fmt: skip
    first = read_metrics(tmp_path / "b")[0]["train_loss"]
    assert first < read_metrics(tmp_path / "a")[0]["train_loss"] - 0.5


def test_config_file_and_preset(tmp_path, text):
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"hidden-size": 8, "batch_size": 2, "data": str(text)}))
    main(["--preset", "karpathy", "--config", str(options), "--seq-length", "4", "--steps", "1",
          "--out", str(tmp_path / "run"), "--device", "cpu"])  # fmt: skip
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    found = {k: config[k] for k in ("hidden_size", "batch_size", "seq_length", "dropout", "lr")}
    assert found == {
        "hidden_size": 8, "batch_size": 2, "seq_length": 4, "dropout": 0.5, "lr": 0.002,
    }  # fmt: skip


def test_schedules():
    class C:
        lr, warmup = 1.0, 10

    def rates(schedule):
        C.lr_schedule = schedule
        return [learning_rate(C, step, 110) for step in range(111)]

    for schedule in ("constant", "cosine", "step"):
        assert rates(schedule)[:10] == [pytest.approx((j + 1) / 10) for j in range(10)]
    assert set(rates("constant")[10:]) == {1.0}
    assert rates("cosine")[10] == pytest.approx(1)
    assert rates("cosine")[110] == pytest.approx(0.1)
    assert rates("step")[10:30] == [1.0] * 20
    assert rates("step")[30] == 0.5


def test_nan_stops_with_advice_and_keeps_the_checkpoint(tmp_path, text, capsys, monkeypatch):
    from fastlstm.text import model

    real, calls = model.loss_nats, []

    def broken(logits, target):
        calls.append(1)
        return real(logits, target) * (math.nan if len(calls) > 20 else 1)

    monkeypatch.setattr(model, "loss_nats", broken)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        main([*TINY, "--data", str(text), "--val-fraction", "0", "--out", str(run)])
    assert error.value.code == 1
    assert "--lr" in capsys.readouterr().err
    meta = json.loads((run / "checkpoints" / "latest" / "meta.json").read_text())
    assert meta["step"] == 20


MISTAKES = {
    "unknown corpus": (["--data", "nowhere"], "'nowhere' is no file"),
    "hidden size": (["--hidden-size", "0"], "--hidden-size: expected at least 1, got 0"),
    "dropout": (["--dropout", "1.5"], "--dropout: expected a probability"),
    "negative rate": (["--lr", "-1"], "--lr: expected a number that is not negative"),
    "nan rate": (["--lr", "nan"], "--lr: expected"),
    "no steps": (["--steps", "0"], "--steps 0"),
    "device": (["--device", "abacus"], "--device: abacus"),
    "half precision on a CPU": (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    "unit": (["--unit", "char"], "not available yet"),
    "compile": (["--compile"], "not available yet"),
    "config": (["--config", "nowhere.json"], "cannot read nowhere.json"),
    "resume of nothing": (["--resume"], "holds no run"),
    "init": (["--init-from", "nowhere"], "nowhere is no run"),
    "batch too large": (["--batch-size", "5000"], "are"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_status_2(tmp_path, text, name, capsys):
    arguments, message = MISTAKES[name]
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        main(["--data", str(text), "--out", str(run), "--device", "cpu", *arguments])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed
    assert not run.exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"a", "one byte"), (b"abc" * 9, "shorter")]
)
def test_too_little_text(tmp_path, content, message, capsys):
    path = tmp_path / "short"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        main(["--data", str(path), "--out", str(tmp_path / "run")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unwritable_folder_and_taken_folder(tmp_path, text, capsys):
    for name in ("file", "taken"):
        run = tmp_path / name
        if name == "file":
            run.write_text("in the way")
        else:
            main([*TINY, "--data", str(text), "--out", str(run), "--steps", "1"])
        with pytest.raises(SystemExit) as error:
            main([*TINY, "--data", str(text), "--out", str(run), "--steps", "1"])
        assert error.value.code == 2
        assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "foreign", "meta", "shape"])
def test_damaged_checkpoints_are_refused(tmp_path, text, damage, capsys):
    run = tmp_path / "run"
    main([*TINY, "--data", str(text), "--out", str(run), "--steps", "5"])
    latest = run / "checkpoints" / "latest"
    if damage == "truncated":
        data = (latest / "model.safetensors").read_bytes()
        (latest / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        (latest / "model.safetensors").write_bytes(b"\x80\x04not safetensors")
    elif damage == "meta":
        (latest / "meta.json").write_text('{"step": "many"}')
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(3)}, latest / "model.safetensors")
    with pytest.raises(SystemExit) as error:
        main(["--out", str(run), "--resume", "--steps", "9"])
    assert error.value.code == 2
    assert "checkpoint" in capsys.readouterr().err


def test_resume_refuses_what_would_change_the_run(tmp_path, text, capsys):
    run = tmp_path / "run"
    main([*TINY, "--data", str(text), "--out", str(run), "--steps", "5"])
    for arguments, message in (
        (["--hidden-size", "17"], "--hidden-size: the run"),
        (["--data", str(tmp_path)], "--data: the run"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["--out", str(run), "--resume", *arguments])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    text.write_text(text.read_text() + "more")
    with pytest.raises(SystemExit):
        main(["--out", str(run), "--resume", "--steps", "9"])
    assert "not the one" in capsys.readouterr().err


def test_standard_library_is_the_same_every_time():
    first, second = corpus.load(["stdlib"]), corpus.load(["stdlib"])
    assert first.sha256 == second.sha256
    assert first.data.size > 5_000_000
    assert b"def dataclass(" in first.data.tobytes()


def test_files_folders_and_globs_are_concatenated_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one ")
    (tmp_path / "b" / "c.txt").write_bytes(b"two ")
    (tmp_path / ".hidden").write_bytes(b"never")
    assert corpus.load([str(tmp_path)]).data.tobytes() == b"one two "
    assert corpus.load([str(tmp_path / "*.txt"), str(tmp_path / "b")]).data.tobytes() == b"one two "
    assert corpus.load([str(tmp_path / "a.txt")]).vocabulary == sorted(b"one ")
    with pytest.raises(UserError, match="no file"):
        corpus.load([str(tmp_path / "*.md")])


def test_streams_continue_from_window_to_window(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(bytes(range(97)))
    found = corpus.load([str(path)])
    streams = corpus.Streams(found, 0, 97, 3, 5)
    assert (streams.length, streams.windows) == (32, 6)
    for j in range(streams.windows):
        x, y = streams.window(j)
        assert x[:, 1].tolist() == list(range(32 + 5 * j, 37 + 5 * j))
        assert torch.equal(x[1:], y[:-1])
