"""The sampler: reproducible, and faithful to what it was asked."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from fastlstm.sample import main
from fastlstm.text.sampling import filtered
from fastlstm.train import main as train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    text = folder / "text"
    text.write_text("the cat sat on the mat; é à\n" * 400)
    train(["--data", str(text), "--out", str(folder / "run"), "--hidden-size", "32",
           "--batch-size", "8", "--seq-length", "16", "--epochs", "4", "--lr", "1e-2",
           "--sample-every", "0", "--device", "cpu"])  # fmt: skip
    return folder / "run"


def sampled(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments)])
    return capsys.readouterr().out


def test_primer_then_text_that_has_learned(run, capsys):
    out = sampled(capsys, run, "-n", 60, "-p", "the c", "-t", 0)
    assert out.startswith("the cat sat on the mat; é à\nthe cat")


def test_same_seed_same_text(run, capsys):
    one, again, other = (sampled(capsys, run, "-n", 80, "-t", 2, "--seed", s) for s in (1, 1, 2))
    assert one == again != other


def test_stop_string_ends_the_text_before_it(run, capsys):
    assert (
        sampled(capsys, run, "-n", 200, "-p", "the c", "-t", 0, "--stop", " on") == "the cat sat\n"
    )


def test_batch_prints_each_sample(run, capsys):
    out = sampled(capsys, run, "-n", 10, "--batch", 3)
    assert [f"--- {j} ---" in out for j in (1, 2, 3, 4)] == [True, True, True, False]


def test_bf16_weights_and_named_checkpoints(run, capsys):
    assert "cat" in sampled(capsys, run, "-t", 0, "-n", 40, "--weights", "bf16")
    assert sampled(capsys, run, "-n", 20, "--checkpoint", "epoch-1")


def test_score_of_known_text_is_low(run, tmp_path, capsys):
    for name, content in (
        ("known", "the cat sat on the mat; é à\n" * 9),
        ("odd", "ttt;;;nnn mmm" * 9),
    ):
        (tmp_path / name).write_text(content)
    nats = {
        name: float(sampled(capsys, run, "--score", tmp_path / name).split()[0])
        for name in ("known", "odd")
    }
    assert nats["known"] < 0.8 < 2 < nats["odd"]


def test_filters():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {k: filtered(logits, k, None).isfinite().sum().item() for k in (1, 2, 9)}
    assert kept == {1: 1, 2: 2, 9: 4}
    kept = {p: filtered(logits, None, p).isfinite().sum().item() for p in (0.01, 0.5, 0.79, 0.9, 1)}
    assert kept == {0.01: 1, 0.5: 1, 0.79: 2, 0.9: 3, 1: 4}


MISTAKES = {
    "no run": (["nowhere"], "nowhere is no run"),
    "length": (["RUN", "-n", "0"], "-n: expected at least 1"),
    "temperature": (["RUN", "-t", "-1"], "-t: expected"),
    "top-p": (["RUN", "--top-p", "0"], "--top-p"),
    "top-k": (["RUN", "--top-k", "0"], "--top-k"),
    "unseen": (["RUN", "-p", "Z"], "never seen b'Z'"),
    "checkpoint": (["RUN", "--checkpoint", "epoch-99"], "expected one of best, epoch-1"),
    "int8": (["RUN", "--weights", "int8"], "not available yet"),
    "score": (["RUN", "--score", "nowhere"], "cannot read nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_status_2(run, name, capsys):
    arguments, message = MISTAKES[name]
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(run) if a == "RUN" else a for a in arguments])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed


def test_closed_pipe_is_no_traceback(run):
    reader = subprocess.run(
        f"{sys.executable} -m fastlstm.sample {run} -n 20000 | head -c 20",
        shell=True, capture_output=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert len(reader.stdout) == 20
    assert b"Traceback" not in reader.stderr
