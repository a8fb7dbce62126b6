"""A run that begins with the weights of another one."""

import json

import pytest
import torch

pytest.importorskip("safetensors")

from trainer import refused, train_tiny

from fastlstm.text import model as models
from fastlstm.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(sentences):
    return sentences


def test_another_runs_weights_are_a_start(tmp_path, text):
    learned = train_tiny(tmp_path / "a", text, "--epochs", 2, "--lr", 1e-2, "--eval-every", 100)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("quick", "QUICK"))  # characters it never saw
    continued = train_tiny(tmp_path / "b", other, "--steps", 1, "--init-from", tmp_path / "a")
    assert continued[0]["train_loss"] < learned[0]["train_loss"] - 1


def test_another_run_gives_its_architecture(tmp_path, text, capsys):
    train_tiny(tmp_path / "a", text, "--steps", 1)
    main(["--data", str(text), "--out", str(tmp_path / "b"), "--init-from", str(tmp_path / "a"),
          "--steps", "1", "--batch-size", "2", "--device", "cpu",
          "--cell", "torch-lstm"])  # fmt: skip
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["hidden_size"], config["cell"]) == (16, "torch-lstm")
    message = refused(capsys, "--data", text, "--out", tmp_path / "c", "--init-from",
                      tmp_path / "a", "--hidden-size", 8)  # fmt: skip
    assert "has hidden_size 16" in message
    assert not (tmp_path / "c").exists()


def test_adopted_weights_go_to_the_same_characters():
    torch.manual_seed(0)
    small = models.CharModel(3, "lstm", 4, 2, 0.0)
    large = models.CharModel(5, "lstm", 4, 2, 0.0)
    fresh = large.decoder.weight[3].clone()
    models.adopt(large, [1, 2, 3, 4, 5], small, [2, 3, 5], [2, 3, 5])
    x = torch.tensor([[0], [2], [1]])
    theirs, ours = small(x)[0], large(torch.tensor([1, 2, 4])[x])[0]
    assert torch.allclose(theirs, ours[..., [1, 2, 4]], atol=1e-6)
    assert torch.equal(large.decoder.weight[3], fresh)
