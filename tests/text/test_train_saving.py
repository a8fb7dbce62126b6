"""When the trainer saves, and what a run that goes wrong leaves."""

import itertools
import math
import re

import pytest

pytest.importorskip("safetensors")

from trainer import train_tiny

from fastlstm.text import checkpoint
from fastlstm.text import model as models
from fastlstm.text.opening import load_model

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
