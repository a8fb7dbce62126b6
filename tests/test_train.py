"""The trainer: it learns, leaves the files it promises, and answers mistakes with one line."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file
from trainer import refused

from fastlstm.text import checkpoint
from fastlstm.text import model as models
from fastlstm.text.data import corpus
from fastlstm.text.opening import load_model
from fastlstm.text.training import options
from fastlstm.train import learning_rate, main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    *("--hidden-size", "16", "--num-layers", "2", "--dropout", "0.2", "--device", "cpu"),
    *("--batch-size", "4", "--seq-length", "8", "--eval-every", "5", "--sample-every", "0"),
    *("--precision", "fp32"),  # whatever this processor is fast at
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"line {j}: the quick brown fox, {j * 7919 % 97}\n" for j in range(300))
    )
    return path


def train(run, text, *arguments):
    """Train a tiny model; the run's metrics."""
    main([*TINY, "--data", str(text), "--out", str(run), *map(str, arguments)])
    return read_metrics(run)


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_the_files_that_it_promises(tmp_path, text, capsys):
    run = tmp_path / "run"
    metrics = train(run, text, "--epochs", 2, "--lr", 1e-2, "--eval-every", 50,
                    "--sample-every", 250, "--test-fraction", 0.05)  # fmt: skip
    assert metrics[-1]["val_loss"] < metrics[0]["train_loss"] - 1.5
    assert list(metrics[0]) == [
        "step", "epoch", "train_loss", "val_loss", "bpc", "chars_per_second", "seconds",
    ]  # fmt: skip
    assert metrics[0]["bpc"] == pytest.approx(metrics[0]["train_loss"] / math.log(2))
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert [m["step"] for m in metrics if m["val_loss"] is not None][:2] == [50, 100]
    assert metrics[-1]["epoch"] == 2
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "loss.png", "report.html",
        ".lock",
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
    assert (meta["step"], meta["epoch"], meta["position"]) == (len(metrics), 2, 0)
    stored = load_file(run / "checkpoints" / "epoch-1" / "training.safetensors")
    assert not any(name.startswith("state.") for name in stored)  # an epoch begins without memory
    assert meta["vocabulary"] == list(range(256))
    out = capsys.readouterr().out
    assert out.count("-" * 72) == 2 * (len(metrics) // 250 + 1)  # samples, one more at the end
    assert "the quick brown fox" in out  # it has learned its source
    assert "test: " in out
    assert f"python -m fastlstm.sample {run}" in out
    assert f"python -m fastlstm.train --out {run} --resume" in out


def test_a_run_begins_with_how_often_characters_occur(tmp_path, text):
    metrics = train(tmp_path / "run", text, "--steps", 1, "--lr", 1e-30, "--val-fraction", 0.2)
    net, _, _ = load_model(tmp_path / "run", "latest")
    part = text.read_bytes()[: -int(len(text.read_bytes()) * 0.2)]  # held-out text is not counted
    counts = torch.tensor([part.count(v) for v in range(256)]) + 1 / 256
    assert torch.allclose(net.decoder.bias, (counts / (len(part) + 1)).log(), atol=1e-5)
    assert metrics[0]["train_loss"] < math.log(len(set(part))) < math.log(256)


def test_the_state_is_carried_from_window_to_window(tmp_path, text):
    """With a learning rate of nothing, losses are those of one model reading on and on."""
    metrics = train(tmp_path / "run", text, "--steps", 6, "--lr", 1e-30, "--dropout", 0)
    net, _, _ = load_model(tmp_path / "run", "latest")
    data = corpus.load([str(text)])
    streams = corpus.Streams(data, 0, len(data.data) - int(len(data.data) * 0.05), 4, 8)
    windows = [streams.window(j) for j in range(6)]
    x, y = (torch.cat([w[side] for w in windows]) for side in (0, 1))
    with torch.no_grad():
        logits, _ = net(x)
    expected = models.F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    for metric, loss in zip(metrics, expected.split(8), strict=True):
        assert metric["train_loss"] == pytest.approx(loss.mean().item(), abs=1e-6)


def test_the_best_checkpoint_is_the_best(tmp_path, text):
    metrics = train(tmp_path / "run", text, "--steps", 60, "--lr", 5e-2)
    best = min((m["val_loss"], m["step"]) for m in metrics if m["val_loss"] is not None)
    meta = json.loads((tmp_path / "run" / "checkpoints" / "best" / "meta.json").read_text())
    assert (meta["best"], meta["step"]) == best


def test_patience_stops_a_run_that_no_longer_gets_better(tmp_path, text, capsys):
    metrics = train(tmp_path / "run", text, "--steps", 1000, "--lr", 0.5, "--patience", 3)
    losses = [m["val_loss"] for m in metrics if m["val_loss"] is not None]
    assert len(metrics) < 1000
    assert losses.index(min(losses)) == len(losses) - 4
    assert "stopped" in capsys.readouterr().out
    main(["--out", str(tmp_path / "run"), "--resume"])  # resumed, it stays stopped
    assert read_metrics(tmp_path / "run") == metrics


def test_evaluations_and_samples_leave_training_alone(tmp_path, text):
    often = train(tmp_path / "often", text, "--steps", 20, "--eval-every", 1, "--sample-every", 3)
    seldom = train(tmp_path / "seldom", text, "--steps", 20, "--eval-every", 100)
    losses = [[m["train_loss"] for m in run] for run in (often, seldom)]
    assert losses[0] == losses[1]
    assert seldom[-1]["val_loss"] == often[-1]["val_loss"]


def test_the_lstm_follows_torchs(tmp_path, text):
    """Same seed, same steps: the same losses to the accuracy of float32."""
    ours, theirs = (
        train(tmp_path / cell, text, "--cell", cell, "--dropout", 0, "--steps", 50)
        for cell in ("lstm", "torch-lstm")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "torch-lstm", "gru", "rnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cells_learn_in_every_precision(tmp_path, text, cell, precision):
    metrics = train(tmp_path / "run", text, "--cell", cell, "--precision", precision,
                    "--steps", 100, "--lr", 2e-2, "--eval-every", 50)  # fmt: skip
    assert metrics[-1]["val_loss"] < metrics[0]["train_loss"] - 0.5
    net, _, _ = load_model(tmp_path / "run", "latest")
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
def test_optimizers_learn(tmp_path, text, optimizer):
    metrics = train(tmp_path / "run", text, "--optimizer", optimizer, "--steps", 100,
                    "--lr", 1e-2, "--eval-every", 50)  # fmt: skip
    assert metrics[-1]["val_loss"] < metrics[0]["train_loss"] - 0.5


def test_clipping_bounds_the_gradient(tmp_path, text, monkeypatch):
    norms = []
    real = torch.optim.RMSprop.step

    def step(self, *arguments):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.RMSprop, "step", step)
    for name, limit in (("none", 0), ("tight", 0.01)):
        train(tmp_path / name, text, "--optimizer", "rmsprop", "--clip-norm", limit, "--steps", 5)
    assert min(norms[:5]) > 0.02
    assert max(norms[5:]) < 0.011


def test_schedules():
    def rates(**values):
        config = options.Config(lr=1.0, warmup=10, **values)
        return [learning_rate(config, step, 110, step // 5) for step in range(111)]

    for schedule in ("constant", "cosine", "step"):
        found = rates(lr_schedule=schedule)
        assert found[:10] == [pytest.approx((j + 1) / 10) for j in range(10)]
        assert found[10] == pytest.approx(1)
    assert set(rates(lr_schedule="constant")[10:]) == {1.0}
    assert rates(lr_schedule="cosine")[60] == pytest.approx(0.505)
    assert rates(lr_schedule="cosine")[110] == pytest.approx(0.01)
    assert rates(lr_schedule="step")[49] == 1
    assert rates(lr_schedule="step")[50] == pytest.approx(0.97)  # after ten epochs
    assert rates(lr_schedule="step")[55] == pytest.approx(0.97**2)


def test_another_runs_weights_are_a_start(tmp_path, text):
    learned = train(tmp_path / "a", text, "--epochs", 2, "--lr", 1e-2, "--eval-every", 100)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("quick", "QUICK"))  # characters it never saw
    continued = train(tmp_path / "b", other, "--steps", 1, "--init-from", tmp_path / "a")
    assert continued[0]["train_loss"] < learned[0]["train_loss"] - 1


def test_another_run_gives_its_architecture(tmp_path, text, capsys):
    train(tmp_path / "a", text, "--steps", 1)
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


def test_options_come_from_flags_then_the_file_then_the_preset(tmp_path, text):
    values = {"hidden-size": 8, "batch_size": 2, "data": str(text), "lr": 1, "preset": "karpathy"}
    (tmp_path / "options.json").write_text(json.dumps(values))
    request = options.parse(["--config", str(tmp_path / "options.json"), "--lr", "3"], False)
    config = request.config
    assert (config.lr, config.hidden_size, config.data) == (3.0, 8, [str(text)])
    assert (config.dropout, config.seq_length, config.epochs) == (0.5, 100, 50)
    assert {"lr", "hidden_size", "dropout"} <= request.explicit


def test_texts_and_config_files_add_up_however_they_are_given(tmp_path):
    for name, values in (("a", {"lr": 1, "hidden_size": 8}), ("b", {"lr": 2})):
        (tmp_path / name).write_text(json.dumps(values))
    config = options.parse(
        ["--data", "x", "--data", "y", "z", "--config", str(tmp_path / "a"),
         "--config", str(tmp_path / "b")], False
    ).config  # fmt: skip
    assert config.data == ["x", "y", "z"]
    assert (config.lr, config.hidden_size) == (2.0, 8)  # of files, the later one


def test_toml_config(tmp_path, capsys):
    path = tmp_path / "options.toml"
    path.write_text('hidden-size = 8\ndata = ["a", "b"]\nlr = 1e-3\n')
    if sys.version_info < (3, 11):
        assert "TOML needs Python 3.11" in refused(capsys, "--config", path)
        return
    config = options.parse(["--config", str(path)], False).config
    assert (config.hidden_size, config.data, config.lr) == (8, ["a", "b"], 1e-3)


def test_a_runs_config_repeats_it(tmp_path, text):
    first = train(tmp_path / "a", text, "--steps", 5)
    main(["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")])
    again = read_metrics(tmp_path / "b")
    assert [m["train_loss"] for m in first] == [m["train_loss"] for m in again]


def test_the_default_length_has_a_schedule_and_a_given_one_is_plain():
    quick, given = options.parse([], False).config, options.parse(["--steps", "9"], False).config
    assert (quick.steps, quick.lr_schedule) == (options.QUICK["steps"], "cosine")
    assert (given.steps, given.lr_schedule) == (9, "constant")
    gpu = options.parse([], True).config
    assert (gpu.hidden_size, gpu.dropout, gpu.batch_size, gpu.seq_length) == (512, 0.5, 100, 100)
    assert options.parse(["--device", "cpu"], True).config == options.Config(
        **{**options.QUICK, "device": "cpu"}
    )


def test_a_short_text_shrinks_the_default_batch_alone(tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("a short text. " * 20)  # 280 bytes, 266 to train on
    arguments = ["--data", str(path), "--hidden-size", "8", "--steps", "1", "--device", "cpu"]
    main([*arguments, "--out", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["batch_size"], config["seq_length"]) == (4, 64)
    message = refused(capsys, *arguments, "--out", tmp_path / "no", "--batch-size", 5)
    assert "5 streams of 64 characters need 321 bytes to train on, there are 266" in message
    assert not (tmp_path / "no").exists()
    for content, expected in ((b"", "empty"), (b"a", "one byte"), (b"abc" * 9, "need 65 bytes")):
        path.write_bytes(content)
        assert expected in refused(capsys, *arguments, "--out", tmp_path / "no")
        assert not (tmp_path / "no").exists()


def test_many_short_epochs_leave_few_checkpoints(tmp_path, text):
    train(tmp_path / "run", text, "--steps", 90, "--batch-size", 40, "--seq-length", 100,
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
            train(run, text, "--val-fraction", 0, "--steps", 30, "--eval-every", 12)
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
    train(tmp_path / "run", text, "--epochs", 1, "--batch-size", 16, "--lr", 1e-2)
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
        train(tmp_path / "run", text, "--steps", 10, "--eval-every", 1000)
    assert load_model(tmp_path / "run", "latest")[2]["step"] == 6


MISTAKES = {
    "unknown corpus": (["--data", "nowhere"], "'nowhere' is no file"),
    "hidden size": (["--hidden-size", "0"], "--hidden-size: expected at least 1, got 0"),
    "dropout": (["--dropout", "1.5"], "--dropout: expected a number below 1"),
    "negative rate": (["--lr", "-1"], "--lr: expected a number above 0"),
    "nan rate": (["--lr", "nan"], "--lr: expected a finite number"),
    "infinite norm": (["--clip-norm", "inf"], "--clip-norm: expected a finite number"),
    "no number": (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    "no steps": (["--steps", "0"], "--steps: expected at least 1"),
    "negative epochs": (["--epochs", "-3"], "--epochs: expected at least 1"),
    "negative seed": (["--seed", "-1"], "--seed: expected at least 0"),
    "large seed": (["--seed", str(2**64)], "--seed: expected a number below 2^63"),
    "fraction": (["--val-fraction", "1"], "--val-fraction: expected a number below 1"),
    "fractions": (["--val-fraction", ".6", "--test-fraction", ".5"], "leave nothing"),
    "too small a part": (["--test-fraction", "1e-9"], "--test-fraction leaves 0 bytes"),
    "unknown flag": (["--colour", "red"], "--colour"),
    "abbreviation": (["--hidden", "8"], "--hidden"),
    "unknown cell": (["--cell", "abacus"], "--cell: invalid choice: 'abacus'"),
    "device": (["--device", "abacus"], "--device: abacus is not available"),
    "missing device": (["--device", "cuda:99"], "--device: cuda:99 is not available"),
    "half precision on a CPU": (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    "config": (["--config", "nowhere.json"], "cannot read nowhere.json"),
    "resume of nothing": (["--resume"], "holds no run"),
    "init": (["--init-from", "nowhere"], "nowhere is no run"),
    "resume and init": (["--resume", "--init-from", "x"], "without --init-from"),
    "batch too large": (["--batch-size", "5000"], "need 40001 bytes to train on, there are"),
    "model too large": (["--hidden-size", str(2**31)], "the model does not fit"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, text, name, capsys):
    arguments, message = MISTAKES[name]
    run = tmp_path / "a" / "run"
    assert message in refused(capsys, *TINY, "--data", text, "--out", run, *arguments)
    assert not run.parent.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid"),
        ("[1]", "holds no table"),
        ('{"hidden": 3}', "unknown option 'hidden'"),
        ('{"lr": "fast"}', "--lr: expected a number, got 'fast'"),
        ('{"lr": true}', "--lr: expected a number, got True"),
        ('{"steps": 1.5}', "--steps: expected a whole number"),
        ('{"cell": "abacus"}', "--cell: expected one of lstm, torch-lstm"),
        ('{"data": [1]}', "--data: expected"),
        ('{"data": []}', "--data: expected"),
        ('{"preset": "x"}', "--preset: expected karpathy"),
        ('{"out": 1}', "out: expected a path"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, content, message, capsys):
    path = tmp_path / "options.json"
    path.write_text(content)
    assert message in refused(capsys, "--config", path)


def test_a_folder_that_is_taken_or_cannot_be_written(tmp_path, text, capsys):
    train(tmp_path / "taken", text, "--steps", 1)
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "taken").rglob("*"))
    (tmp_path / "file").write_text("in the way")
    for name, message in (
        ("taken", "already holds a run; --resume goes on with it"),
        ("file", "is a file"),
        ("file/below", "cannot write to"),
    ):
        assert message in refused(capsys, *TINY, "--data", text, "--out", tmp_path / name)
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "taken").rglob("*")) == before
    assert (tmp_path / "file").read_text() == "in the way"


def test_without_a_folder_a_new_one_is_made_and_named(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        main([*TINY, "--data", str(text), "--steps", "1"])
        assert f"runs/text-{number}: " in capsys.readouterr().out
        assert (tmp_path / "runs" / f"text-{number}" / "config.json").exists()


@pytest.mark.parametrize("package", ["safetensors", "tqdm", "matplotlib", "numpy", "filelock"])
def test_a_missing_package_is_named(tmp_path, text, package):
    """In a process of its own, for ours has them all loaded."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from fastlstm.train import main; main(sys.argv[1:])"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "--data", text, "--out", tmp_path / "run"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert found.returncode == 2
    line = f"fastlstm.train: error: {package} is not installed: pip install 'fastlstm[text]'\n"
    assert found.stderr.endswith(line)
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()
