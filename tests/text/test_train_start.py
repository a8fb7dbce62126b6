"""A run that begins with the weights of another one."""

import json

import pytest
import torch

pytest.importorskip("safetensors")

from trainer import metrics, refused, train, train_tiny

import fastlstm
from fastlstm import sample
from fastlstm.text import model as models
from fastlstm.text.opening import load_model
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


def test_a_run_that_began_with_another_alphabet_is_whole(tmp_path, capsys):
    for name, line in (("latin", "the quick brown fox\n"), ("cyrillic", "тихий океан, the sea\n")):
        (tmp_path / f"{name}.txt").write_text(line * 60, encoding="utf-8")
    train_tiny(tmp_path / "a", tmp_path / "latin.txt", "--unit", "char", "--steps", 2)
    run, options = tmp_path / "b", ("--unit", "char", "--init-from", tmp_path / "a", "--steps", 4)
    train_tiny(run, tmp_path / "cyrillic.txt", *options)
    _, vocabulary, meta = load_model(run, "latest")
    assert set(meta["seen"]) == set(vocabulary) == set(map(ord, "тихий океан, the sea\n"))
    for path in (run / "checkpoints").glob("*/meta.json"):  # as an older version wrote them
        path.write_text(json.dumps({**meta, "seen": sorted({*meta["seen"], *map(ord, "quick")})}))
    train("--out", run, "--resume", "--steps", 6)
    assert len(metrics(run)) == 6
    train_tiny(tmp_path / "c", tmp_path / "latin.txt", "--init-from", run, "--steps", 1)
    capsys.readouterr()
    sample.main([str(run), "-n", "9", "-p", "тихий"])
    assert capsys.readouterr().out.startswith("тихий")


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


def test_any_checkpoint_is_a_start(tmp_path, text):
    first = train_tiny(tmp_path / "a", text, "--steps", 6, "--lr", 1e-2)
    for name in ("latest", "best"):
        start = tmp_path / "a" / "checkpoints" / name
        line = train_tiny(tmp_path / name, text, "--steps", 1, "--init-from", start)[0]
        assert line["train_loss"] < first[0]["train_loss"]
    pytest.importorskip("huggingface_hub")
    fastlstm.text.load(tmp_path / "a").save_pretrained(tmp_path / "shared")
    shared = train_tiny(tmp_path / "b", text, "--steps", 1, "--init-from", tmp_path / "shared")
    assert shared[0]["train_loss"] == line["train_loss"]


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
