"""Mistakes are answered with one line, and leave nothing behind."""

from pathlib import Path

import fork_server
import pytest

pytest.importorskip("safetensors")

from trainer import TINY, refused, train_tiny

from fastlstm.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(sentences):
    return sentences


MISTAKES = {
    "unknown corpus": (["--data", "nowhere"], "'nowhere' is no file"),
    "misspelt corpus": (["--data", "shakespear"], "did you mean shakespeare?"),
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
    "huge batch": (["--batch-size", str(2**62)], "need 36893488147419103233 bytes to train on"),
    "long sequence": (
        ["--batch-size", "1", "--seq-length", "9000000"],
        "or a smaller --seq-length",
    ),
    "model too large": (["--hidden-size", str(2**31)], "the model does not fit"),
    "many layers": (["--num-layers", str(10**12)], "the model does not fit: --num-layers 1000000"),
    "sizes beyond numbers": (["--hidden-size", str(2**62)], "the model does not fit"),
    "no folder's name": (["--out", ""], "--out: expected a path in UTF-8, got ''"),
    "no run's name": (["--init-from", ""], "--init-from: expected a path in UTF-8, got ''"),
    "no text's name": (["--data", ""], "--data: expected texts' names"),
    "patience with nothing": (
        ["--patience", "2", "--val-fraction", "0"],
        "--patience 2: there is no text to validate on",
    ),
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
        ('{"out": "a\\ud800"}', "out: expected a path in UTF-8"),
        ('{"init_from": "a\\u0000b"}', "init-from: expected a path in UTF-8"),
        ('{"lr": 1%s}' % ("0" * 400), "--lr: expected a finite number"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, content, message, capsys):
    path = tmp_path / "options.json"
    path.write_text(content)
    assert message in refused(capsys, "--config", path)


def test_a_folder_that_is_taken_or_cannot_be_written(tmp_path, text, capsys):
    train_tiny(tmp_path / "taken", text, "--steps", 1)
    train_tiny(tmp_path / "damaged", text, "--steps", 1)
    (tmp_path / "damaged" / "config.json").unlink()
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.glob("*/**/*"))
    (tmp_path / "file").write_text("in the way")
    for name, message in (
        ("taken", "already holds a run; --resume goes on with it"),
        ("damaged", "has a metrics.jsonl but no config.json"),
        ("file", "is a file"),
        ("file/below", "cannot write to"),
    ):
        assert message in refused(capsys, *TINY, "--data", text, "--out", tmp_path / name)
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.glob("*/**/*")) == before
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
    code = fork_server.without(package) + "from fastlstm.train import main; main(sys.argv[1:])"
    words = ["-W", "ignore", "-c", code, "--data", text, "--out", tmp_path / "run"]
    process = fork_server.run(*words, cwd=Path(__file__).parents[2])
    assert process.returncode == 2
    line = f"fastlstm.train: error: {package} is not installed: pip install 'fastlstm[text]'\n"
    assert process.stderr.endswith(line)
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()
