"""Where the trainer's options come from: flags, files, presets, and the machine."""

import json
import sys

import pytest

pytest.importorskip("safetensors")

from trainer import metrics, refused, train_tiny

from fastlstm.text.training import options
from fastlstm.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(sentences):
    return sentences


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


def test_a_config_of_windows_begins_with_a_mark(tmp_path):
    path = tmp_path / "options.json"
    path.write_text('{"hidden-size": 8}', encoding="utf-8-sig")
    assert options.parse(["--config", str(path)], False).config.hidden_size == 8


def test_a_runs_config_repeats_it(tmp_path, text):
    first = train_tiny(tmp_path / "a", text, "--steps", 5)
    main(["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")])
    repeated = metrics(tmp_path / "b")
    assert [m["train_loss"] for m in first] == [m["train_loss"] for m in repeated]


def test_a_unit_given_by_a_flag_has_no_use_for_the_files_tokens(tmp_path):
    path = tmp_path / "options.json"
    path.write_text('{"unit": "bpe", "vocabulary": 300}')
    assert options.parse(["--config", str(path)], False).config.vocabulary == 300
    config = options.parse(["--config", str(path), "--unit", "byte"], False).config
    assert (config.unit, config.vocabulary) == ("byte", None)


def test_the_default_length_has_a_schedule_and_a_given_one_is_plain():
    quick, plain = options.parse([], False).config, options.parse(["--steps", "9"], False).config
    assert (quick.steps, quick.lr_schedule) == (options.QUICK["steps"], "cosine")
    assert (plain.steps, plain.lr_schedule) == (9, "constant")
    gpu = options.parse([], True).config
    assert (gpu.hidden_size, gpu.dropout, gpu.batch_size, gpu.seq_length) == (512, 0.5, 100, 100)
    assert options.parse(["--device", "cpu"], True).config == options.Config(
        **{**options.QUICK, "device": "cpu"}
    )


def test_null_in_a_file_is_the_default(tmp_path):
    """And no run without an end."""
    path = tmp_path / "options.json"
    path.write_text('{"steps": null, "epochs": null, "weight_decay": null}')
    assert options.parse(["--config", str(path)], False) == options.parse([], False)
    given = options.parse(["--config", str(path), "--preset", "karpathy"], False).config
    assert given.epochs == options.KARPATHY["epochs"]


def test_a_short_text_shrinks_the_default_batch_alone(tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("a short text. " * 20)  # 280 bytes, 266 to train on
    arguments = ["--data", str(path), "--hidden-size", "8", "--steps", "1", "--device", "cpu"]
    main([*arguments, "--out", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["batch_size"], config["seq_length"]) == (4, 64)
    message = refused(capsys, *arguments, "--out", tmp_path / "no", "--batch-size", 5)
    assert "5 x 64 characters (--batch-size x --seq-length) need 321 bytes to" in message
    assert not (tmp_path / "no").exists()
    for content, expected in (
        (b"", "empty"),
        (b"a", "one character"),
        (b"abc" * 9, "need 65 bytes"),
    ):
        path.write_bytes(content)
        assert expected in refused(capsys, *arguments, "--out", tmp_path / "no")
        assert not (tmp_path / "no").exists()
