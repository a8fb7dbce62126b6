"""The trainer learns, and leaves the files that it promises."""

import json
import math
import shlex

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file
from trainer import metrics, train_tiny

from fastlstm.text import model as models
from fastlstm.text.data import corpus
from fastlstm.text.opening import load_model
from fastlstm.text.training import options
from fastlstm.text.training.schedule import learning_rate
from fastlstm.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(sentences):
    return sentences


def test_it_learns_and_leaves_the_files_that_it_promises(tmp_path, text, capsys):
    run = tmp_path / "run"
    lines = train_tiny(run, text, "--epochs", 2, "--lr", 1e-2, "--eval-every", 50,
                    "--sample-every", 250, "--test-fraction", 0.05)  # fmt: skip
    assert lines[-1]["val_loss"] < lines[0]["train_loss"] - 1.5
    assert list(lines[0]) == [
        "step", "epoch", "train_loss", "val_loss", "bpc", "chars_per_second", "seconds", "lr",
        "grad_norm",
    ]  # fmt: skip
    assert lines[0]["bpc"] == pytest.approx(lines[0]["train_loss"] / math.log(2))
    assert [m["step"] for m in lines] == list(range(1, len(lines) + 1))
    assert [m["step"] for m in lines if m["val_loss"] is not None][:2] == [50, 100]
    assert lines[-1]["epoch"] == 2
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "loss.png", "report.html",
        ".lock", "about.json",
    }  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "latest", "best", "epoch-1", "epoch-2",
    }  # fmt: skip
    for folder in (run / "checkpoints").iterdir():
        assert {p.name for p in folder.iterdir()} == {
            "model.safetensors", "training.safetensors", "meta.json",
        }  # fmt: skip
    meta = json.loads((run / "checkpoints" / "latest" / "meta.json").read_text())
    assert (meta["step"], meta["epoch"], meta["position"]) == (len(lines), 2, 0)
    stored = load_file(run / "checkpoints" / "epoch-1" / "training.safetensors")
    assert not any(name.startswith("state.") for name in stored)  # an epoch begins without memory
    assert meta["vocabulary"] == list(range(256))
    out = capsys.readouterr().out
    assert out.count("-" * 72) == 2 * (len(lines) // 250 + 1)  # samples, one more at the end
    assert "the quick brown fox" in out  # it has learned its source
    assert "test: " in out
    assert f"python -m fastlstm.sample {run}" in out
    assert f"python -m fastlstm.train --out {run} --resume" in out


def test_a_run_begins_with_how_often_characters_occur(tmp_path, text):
    lines = train_tiny(tmp_path / "run", text, "--steps", 1, "--lr", 1e-30, "--val-fraction", 0.2)
    net, _, _ = load_model(tmp_path / "run", "latest")
    part = text.read_bytes()[: -int(len(text.read_bytes()) * 0.2)]  # held-out text is not counted
    counts = torch.tensor([part.count(v) for v in range(256)]) + 1 / 256
    assert torch.allclose(net.decoder.bias, (counts / (len(part) + 1)).log(), atol=1e-5)
    assert lines[0]["train_loss"] < math.log(len(set(part))) < math.log(256)


def test_the_state_is_carried_from_window_to_window(tmp_path, text):
    """With a learning rate of nothing, losses are those of one model reading on and on."""
    lines = train_tiny(tmp_path / "run", text, "--steps", 6, "--lr", 1e-30, "--dropout", 0)
    net, _, _ = load_model(tmp_path / "run", "latest")
    data = corpus.load([str(text)])
    streams = corpus.Streams(data, 0, len(data.data) - int(len(data.data) * 0.05), 4, 8)
    windows = [streams.window(j) for j in range(6)]
    x, y = (torch.cat([w[side] for w in windows]) for side in (0, 1))
    with torch.no_grad():
        logits, _ = net(x)
    expected = models.F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    for metric, loss in zip(lines, expected.split(8), strict=True):
        assert metric["train_loss"] == pytest.approx(loss.mean().item(), abs=1e-5)


def test_the_best_checkpoint_is_the_best(tmp_path, text):
    lines = train_tiny(tmp_path / "run", text, "--steps", 60, "--lr", 5e-2)
    best = min((m["val_loss"], m["step"]) for m in lines if m["val_loss"] is not None)
    meta = json.loads((tmp_path / "run" / "checkpoints" / "best" / "meta.json").read_text())
    assert (meta["best"], meta["step"]) == best


def test_patience_stops_a_run_that_no_longer_gets_better(tmp_path, text, capsys):
    lines = train_tiny(tmp_path / "run", text, "--steps", 1000, "--lr", 0.5, "--patience", 3)
    losses = [m["val_loss"] for m in lines if m["val_loss"] is not None]
    assert len(lines) < 1000
    assert losses.index(min(losses)) == len(losses) - 4
    printed = capsys.readouterr().out
    assert "no better validation loss in 3 evaluations: stopped" in printed
    main(["--out", str(tmp_path / "run"), "--resume"])  # resumed, it stays stopped
    assert metrics(tmp_path / "run") == lines
    words = shlex.split(printed.split("go on:")[1])  # but not as it says
    main(words[words.index("--out") :])
    assert len(metrics(tmp_path / "run")) == 2 * len(lines)


def test_evaluations_and_samples_leave_training_alone(tmp_path, text):
    often = train_tiny(
        tmp_path / "often", text, "--steps", 20, "--eval-every", 1, "--sample-every", 3
    )
    seldom = train_tiny(tmp_path / "seldom", text, "--steps", 20, "--eval-every", 100)
    losses = [[m["train_loss"] for m in run] for run in (often, seldom)]
    assert losses[0] == losses[1]
    assert seldom[-1]["val_loss"] == often[-1]["val_loss"]


def test_the_lstm_follows_torchs(tmp_path, text):
    """Same seed, same steps: the same losses to the accuracy of float32."""
    ours, theirs = (
        train_tiny(tmp_path / cell, text, "--cell", cell, "--dropout", 0, "--steps", 50)
        for cell in ("lstm", "torch-lstm")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "torch-lstm", "gru", "rnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cells_learn_in_every_precision(tmp_path, text, cell, precision):
    lines = train_tiny(tmp_path / "run", text, "--cell", cell, "--precision", precision,
                    "--steps", 100, "--lr", 2e-2, "--eval-every", 50)  # fmt: skip
    assert lines[-1]["val_loss"] < lines[0]["train_loss"] - 0.5
    net, _, _ = load_model(tmp_path / "run", "latest")
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
def test_optimizers_learn(tmp_path, text, optimizer):
    lines = train_tiny(tmp_path / "run", text, "--optimizer", optimizer, "--steps", 100,
                    "--lr", 1e-2, "--eval-every", 50)  # fmt: skip
    assert lines[-1]["val_loss"] < lines[0]["train_loss"] - 0.5


def test_clipping_bounds_the_gradient(tmp_path, text, monkeypatch):
    norms = []
    real = torch.optim.RMSprop.step

    def step(self, *arguments):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.RMSprop, "step", step)
    for name, limit in (("none", 0), ("tight", 0.01)):
        train_tiny(
            tmp_path / name, text, "--optimizer", "rmsprop", "--clip-norm", limit, "--steps", 5
        )
    assert min(norms[:5]) > 0.02
    assert max(norms[5:]) < 0.011


def test_schedules():
    def rates(**values):
        config = options.Config(lr=1.0, warmup=10, **values)
        return [learning_rate(config, step, 110, step // 5) for step in range(111)]

    for schedule in ("constant", "cosine", "step"):
        scheduled = rates(lr_schedule=schedule)
        assert scheduled[:10] == [pytest.approx((j + 1) / 10) for j in range(10)]
        assert scheduled[10] == pytest.approx(1)
    assert set(rates(lr_schedule="constant")[10:]) == {1.0}
    assert rates(lr_schedule="cosine")[60] == pytest.approx(0.505)
    assert rates(lr_schedule="cosine")[110] == pytest.approx(0.01)
    assert rates(lr_schedule="step")[49] == 1
    assert rates(lr_schedule="step")[50] == pytest.approx(0.97)  # after ten epochs
    assert rates(lr_schedule="step")[55] == pytest.approx(0.97**2)
