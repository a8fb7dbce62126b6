"""about.json and the log: what a run's page and a comparison know of a run."""

import json
import math
import shlex
import sys

import pytest

pytest.importorskip("safetensors")

import torch
from trainer import metrics, refused, train

import fastlstm
from fastlstm.text.training import about
from fastlstm.text.training.records import Metrics

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ("--hidden-size", 8, "--batch-size", 4, "--seq-length", 8, "--sample-every", 0, "--device",
        "cpu")  # fmt: skip


def test_a_run_says_what_made_it(tmp_path, text):
    run = tmp_path / "a run"
    arguments = ["--data", text, "--out", run, *TINY, "--steps", 3, "--test-fraction", 0.1]
    train(*arguments)
    found = json.loads((run / "about.json").read_text())
    (command,) = found["commands"]
    assert shlex.split(command) == ["python", "-m", "fastlstm.train", *map(str, arguments)]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["fastlstm"] == fastlstm.__version__
    assert found["machine"]["processor"]
    assert found["machine"]["precision"] in ("fp32", "bf16")
    said, data = found["text"], text.read_bytes()
    parts = [said[f"bytes to {what} on"] for what in ("train", "validate", "test")]
    assert sum(parts) == said["bytes"] == len(data)
    assert said["different bytes"] == len(set(data))
    seen = data[: parts[0]]
    shares = [seen.count(value) / len(seen) for value in set(seen)]
    entropy = -sum(p * math.log2(p) for p in shares)
    assert said["bits a character by frequencies alone"] == pytest.approx(entropy, abs=6e-4)
    assert said["the most frequent"].startswith(f"space {max(shares):.1%}, ")


def test_a_resumed_run_keeps_every_command(tmp_path, text, monkeypatch):
    run = tmp_path / "run"
    train("--data", text, "--out", run, *TINY, "--steps", 2)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(run), "--resume", "--steps", "4"])
    fastlstm.train.main()
    assert len(about.read(run / "about.json")["commands"]) == 2
    assert about.read(run / "about.json")["commands"][1].endswith(" --resume --steps 4")
    train("--out", run, "--resume")  # nothing to do
    assert len(about.read(run / "about.json")["commands"]) == 2
    (run / "about.json").unlink()  # as in runs of older versions
    train("--out", run, "--resume", "--steps", 5)
    assert len(about.read(run / "about.json")["commands"]) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"commands": 1, "machine": {}, "text": {}}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path, content):
    (tmp_path / "about.json").write_text(content)
    assert about.read(tmp_path / "about.json") == {}


def test_a_folder_that_takes_no_more_files_is_a_mistake(tmp_path, text, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(about, "write_text", full)
    said = refused(capsys, "--data", text, "--out", tmp_path / "run", *TINY, "--steps", 2)
    assert f"--out: cannot write to {tmp_path / 'run'}: No space left" in said
    assert not (tmp_path / "run").exists()


def test_every_step_logs_its_learning_rate_and_its_gradient(tmp_path, text):
    """The norm is the one before clipping."""
    run = tmp_path / "run"
    train("--data", text, "--out", run, *TINY, "--steps", 4, "--warmup", 2, "--lr", 1e-2,
          "--clip-norm", 1e-4)  # fmt: skip
    lines = metrics(run)
    assert [line["lr"] for line in lines] == [0.005, 0.01, 0.01, 0.01]
    assert all(line["grad_norm"] > 1e-2 for line in lines)


def test_logs_of_older_versions_lack_them(tmp_path):
    log = Metrics(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "train_loss": 2.0, "val_loss": None})
    log.log(2, 0.1, 2.0, None, 1.0, 1.0, 1e-3, math.inf)  # as fp16's scaler may see
    log.close()
    again = Metrics(tmp_path / "metrics.jsonl")
    again.keep_until(2)
    assert math.isnan(again.rates[0])
    assert again.rates[1] == 1e-3
    assert all(math.isnan(norm) for norm in again.norms)
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
