"""What the trainer takes besides bytes and flags: characters, others' configs, the compiler."""

import json

import pytest

pytest.importorskip("safetensors")

from fastlstm import inspect, sample
from fastlstm.text.opening import load_model
from fastlstm.train import main

TINY = [
    *("--hidden-size", "16", "--num-layers", "2", "--dropout", "0.2", "--device", "cpu"),
    *("--batch-size", "4", "--seq-length", "8", "--eval-every", "5", "--sample-every", "0"),
    *("--precision", "fp32"),  # whatever this processor is fast at
]
LINE = "Größe 3 €: naïve 日本語 🙂 und mehr\n"


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def train(run, *arguments):
    main([*TINY, "--out", str(run), *map(str, arguments)])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_characters_are_code_points(tmp_path, capsys):
    text = write(tmp_path / "text", LINE * 120)
    train(tmp_path / "run", "--data", text, "--unit", "char", "--steps", 12)
    _, vocabulary, meta = load_model(tmp_path / "run", "latest")
    assert meta["unit"] == "char"
    assert "".join(map(chr, vocabulary)) == "".join(sorted(set(LINE)))
    capsys.readouterr()
    sample.main([str(tmp_path / "run"), "-n", "40", "-p", "日本", "--checkpoint", "latest"])
    out = capsys.readouterr().out
    assert out.startswith("日本")
    assert len(out.rstrip("\n")) >= 38
    assert set(out) <= set(LINE)
    sample.main([str(tmp_path / "run"), "--score", str(text), "--checkpoint", "latest"])
    assert "nats a character" in capsys.readouterr().out


def test_characters_that_the_model_does_not_know_are_skipped_and_counted(tmp_path, capsys):
    text = write(tmp_path / "text", LINE * 120)
    odd = write(tmp_path / "odd", "Ω“" + LINE * 9 + "Ω")
    run = str(tmp_path / "run")
    train(tmp_path / "run", "--data", text, "--unit", "char", "--steps", 12)
    printed = {}
    for name, arguments in {
        "plain": ["--score", str(write(tmp_path / "plain", LINE * 9))],
        "odd": ["--score", str(odd)],
        "primer": ["-n", "20", "-t", "0", "-p", "naïve"],
        "odd primer": ["-n", "20", "-t", "0", "-p", "naΩïve"],
        "none": ["-n", "20", "-t", "0"],
        "unknown primer": ["-n", "20", "-t", "0", "-p", "Ω"],
    }.items():
        capsys.readouterr()
        sample.main([run, *arguments])
        printed[name] = capsys.readouterr()
    assert printed["odd"].out == printed["plain"].out
    assert printed["odd primer"].out.removeprefix("naΩïve") == printed["primer"].out[5:]
    assert printed["unknown primer"].out.removeprefix("Ω") == printed["none"].out
    line = "fastlstm.sample: {}: the model has never seen {}: skipped\n"
    assert printed["odd"].err == line.format("--score", "3 characters")
    assert printed["odd primer"].err == line.format("-p", "1 character")
    assert printed["plain"].err == printed["primer"].err == printed["none"].err == ""
    inspect.main([run, "--text", str(odd)])
    printed = capsys.readouterr()
    assert "--text: the model has never seen 3 characters: skipped" in printed.err
    page = (tmp_path / "run" / "inspect.html").read_text(encoding="utf-8")
    assert f"It read {len(LINE) * 9} characters" in page
    with pytest.raises(SystemExit):
        sample.main([run, "--score", str(write(tmp_path / "unknown", "ΩΩΩm"))])
    assert "holds less than two characters that the model knows" in capsys.readouterr().err


def test_bytes_that_are_no_text_do_not_stop_a_run_of_characters(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes((LINE * 60).encode() + b"\xff\xfe" + (LINE * 60).encode()[:-9])
    train(tmp_path / "run", "--data", text, "--unit", "char", "--steps", 2)
    assert "U+FFFD" in capsys.readouterr().out


def test_configs_of_karpathy_rnns_repro(tmp_path):
    """Its folders hold these two files, beside the text two folders up."""
    folder = tmp_path / "experiment" / "runs" / "small-model"
    folder.mkdir(parents=True)
    (tmp_path / "experiment" / "data").mkdir()
    write(tmp_path / "experiment" / "data" / "input.txt", LINE * 500)
    write(folder / "model.json", {"hidden_size": 24, "num_layers": 2, "dropout": 0.5})
    write(folder / "train.json", {
        "seq_length": 12, "batch_size": 6, "val_batch_percent": 5, "optimizer": "Adam",
        "lr": 0.0003, "weight_decay": 0.0, "epochs": 300, "max_grad_norm": 4.0, "patience": 7,
    })  # fmt: skip
    main(["--config", str(folder), "--out", str(tmp_path / "run"), "--steps", "3"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {
        "hidden_size": 24, "num_layers": 2, "dropout": 0.5, "seq_length": 12, "batch_size": 6,
        "val_fraction": 0.05, "optimizer": "adam", "lr": 0.0003, "weight_decay": 0.0,
        "clip_norm": 4.0, "patience": 7, "steps": 3,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_a_broken_config_of_theirs_is_one_line(tmp_path, capsys):
    text = write(tmp_path / "text", LINE * 120)
    broken = write(tmp_path / "train.json", '{"seq_length": 100, "patience" 5}')
    with pytest.raises(SystemExit) as error:
        main(["--config", str(broken), "--data", str(text), "--out", str(tmp_path / "run")])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "train.json is not valid" in printed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-3)])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, precision, tolerance):
    text = write(tmp_path / "text", LINE * 120)
    arguments = ("--data", text, "--steps", 4, "--dropout", 0, "--precision", precision)
    eager = train(tmp_path / "eager", *arguments)
    compiled = train(tmp_path / "compiled", *arguments, "--compile")
    for a, b in zip(eager, compiled, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=tolerance)
