"""The sampler: reproducible, and faithful to what it was asked."""

import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from fastlstm.generation.draw import Draw
from fastlstm.sample import main
from fastlstm.text import checkpoint, sampling
from fastlstm.text.alphabet import Decoder
from fastlstm.text.model import CharModel
from fastlstm.text.opening import load_model
from fastlstm.train import main as train

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = "the cat sat on the mat; é à\n"


def train_on(folder, text, *arguments):
    (folder / "text").write_text(text, encoding="utf-8")
    train(["--data", str(folder / "text"), "--out", str(folder / "run"), "--hidden-size", "32",
           "--batch-size", "8", "--seq-length", "16", "--lr", "1e-2", "--sample-every", "0",
           "--device", "cpu", *arguments])  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_on(tmp_path_factory.mktemp("sample"), LINE * 400, "--epochs", "4")


def sampled(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments)])
    return capsys.readouterr().out


def test_the_primer_then_text_that_has_learned(run, capsys):
    out = sampled(capsys, run, "-n", 60, "-p", "the c", "-t", 0)
    assert out.startswith(f"the c{LINE[5:]}the cat")
    assert len(out.encode()) == 5 + 60 + 1  # the primer, what was asked for, a newline


def test_the_same_seed_gives_the_same_text(run, capsys):
    first, second, other = (sampled(capsys, run, "-n", 80, "-t", 2, "--seed", s) for s in (1, 1, 2))
    assert first == second != other


def test_a_stop_string_ends_the_text_before_it(run, capsys):
    arguments = (run, "-n", 205, "-p", "the c", "-t", 0)
    assert sampled(capsys, *arguments, "--stop", " on") == "the cat sat\n"
    assert sampled(capsys, *arguments, "--stop", "; é") == "the cat sat on the mat\n"
    assert len(sampled(capsys, *arguments, "--stop", "never").encode()) == 7 * 30 + 1


def test_a_batch_prints_each_sample(run, capsys):
    out = sampled(capsys, run, "-n", 60, "--batch", 3, "-p", "the c", "-t", 2)
    parts = out.split("--- ")
    assert [part[:5] for part in parts] == ["", "1 ---", "2 ---", "3 ---"]
    texts = [part[6:] for part in parts[1:]]
    assert all(text.startswith("the c") for text in texts)
    assert len(set(texts)) == 3


def test_a_large_batch_is_drawn_a_part_at_a_time(run, capsys, monkeypatch):
    """So that the first texts come soon; those of one part are what they were without parts."""
    arguments = (run, "-n", 30, "--batch", 7, "-p", "the c", "-t", 2)
    whole = sampled(capsys, *arguments).split("--- ")
    module = sys.modules["fastlstm.sample"]
    monkeypatch.setattr(sampling, "TOGETHER", 3)
    sizes, real = [], sampling.stream

    def stream(model, prime, *rest, **options):
        sizes.append(prime.shape[1])
        return real(model, prime, *rest, **options)

    monkeypatch.setattr(sampling, "stream", stream)
    parts = sampled(capsys, *arguments).split("--- ")
    assert sizes == [3, 3, 1]
    assert parts[:4] == whole[:4]
    assert [part.split(" ")[0] for part in parts[1:]] == list("1234567")
    assert len({part[1:] for part in parts[1:]}) == 7
    first = main_until_first_text(module, arguments)
    assert first.startswith("--- 1 ---\nthe c")


def main_until_first_text(module, arguments):
    """What is printed first, where whoever reads leaves after that."""
    with pytest.MonkeyPatch.context() as patch:
        from tqdm import tqdm

        written = []

        def write(text):
            written.append(text)
            raise KeyboardInterrupt

        patch.setattr(tqdm, "write", write)
        with pytest.raises(SystemExit):
            module.main([str(a) for a in arguments])
    return written[0]


def test_a_primer_can_come_from_standard_input(run, capsys, monkeypatch):
    for text in (b"the c", "é à\nthe c".encode()):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
        out = sampled(capsys, run, "-n", 20, "-t", 0, "-p", "-")
        assert out == sampled(capsys, run, "-n", 20, "-t", 0, "-p", text.decode())
        assert out.startswith(text.decode() + "at sat")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert sampled(capsys, run, "-n", 20, "-p", "-") == sampled(capsys, run, "-n", 20)


def test_a_checkpoints_folder_is_as_good_as_its_name(run, tmp_path, capsys, monkeypatch):
    folder = run / "checkpoints" / "epoch-1"
    expected = sampled(capsys, run, "-n", 40, "--checkpoint", "epoch-1")
    assert sampled(capsys, folder, "-n", 40) == expected
    assert sampled(capsys, f"{folder}/", "-n", 40, "--checkpoint", "epoch-1") == expected
    monkeypatch.chdir(folder.parent)
    assert sampled(capsys, "epoch-1", "-n", 40) == expected
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert sampled(capsys, tmp_path / "elsewhere", "-n", 40) == expected


def test_small_changes_of_the_weights_and_other_checkpoints(run, capsys):
    for weights in ("bf16", "int8"):
        assert "cat" in sampled(capsys, run, "-t", 0, "-n", 40, "--weights", weights)
    early = sampled(capsys, run, "-n", 40, "-t", 0, "--checkpoint", "epoch-1")
    assert early == sampled(capsys, run, "-n", 40, "-t", 0, "--checkpoint", "epoch-1")


def test_a_top_k_beyond_the_vocabulary_keeps_all_of_it(run, capsys):
    drawn = sampled(capsys, run, "-n", "40")
    assert sampled(capsys, run, "-n", "40", "--top-k", 10**30) == drawn


def test_top_k_1_is_greedy_at_any_temperature(run, capsys):
    greedy = sampled(capsys, run, "-n", 80, "-t", 0)
    assert sampled(capsys, run, "-n", 80, "-t", 9, "--top-k", 1) == greedy
    assert sampled(capsys, run, "-n", 80, "-t", 9, "--top-p", 1e-9) == greedy
    assert sampled(capsys, run, "-n", 80, "-t", 1e-300) == greedy


def test_a_score_is_the_mean_loss_of_every_character_but_the_first(run, tmp_path, capsys):
    path = tmp_path / "scored"
    text = (LINE * 12).encode()[:300] + b"tttt;;;;mmmm"
    path.write_bytes(text)
    printed = sampled(capsys, run, "--score", path)
    net, vocabulary, _ = load_model(run, "best")
    x = torch.tensor([vocabulary.index(b) for b in text])[:, None]
    with torch.no_grad():
        p = net(x[:-1])[0].double().log_softmax(-1)
    nats = -p.gather(-1, x[1:, :, None]).mean().item()
    assert printed == (
        f"{nats:.4f} nats a character, {nats / math.log(2):.4f} bits, "
        f"perplexity {math.exp(nats):.3f}\n"
    )


def test_a_perplexity_is_short_however_large(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "score", lambda *_: 900.0)
    (tmp_path / "text").write_text(LINE)
    assert sampled(capsys, run, "--score", tmp_path / "text").endswith("perplexity 1.014e+304\n")


def test_known_text_scores_better(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "known").write_text(LINE * 9)
    known = float(sampled(capsys, run, "--score", tmp_path / "known").split()[0])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ttt;;;nnn mmm" * 9)))
    odd = float(sampled(capsys, run, "--score", "-").split()[0])
    assert known < 0.5 < 2 < odd


def test_a_model_of_bytes_takes_every_byte(run, tmp_path, capsys):
    path = tmp_path / "odd"
    path.write_bytes("the “cat”\n".encode() + bytes(range(256)))
    main([str(run), "--score", str(path)])
    printed = capsys.readouterr()
    assert 1 < float(printed.out.split()[0]) < 40
    main([str(run), "-n", "60", "-t", "0", "-p", "“Ω” "])
    primed = capsys.readouterr()
    assert primed.out.startswith("“Ω” ")
    assert printed.err == primed.err == ""


def test_a_model_that_knows_some_bytes_skips_the_others(tmp_path, capsys):
    """Checkpoints from before every byte was in the vocabulary."""
    known = b"\n abceht"
    model = CharModel(len(known), "lstm", 8, 1, 0.0)
    meta = {"format": 1, "step": 1, "position": 0, "epoch": 0, "unit": "byte",
            "vocabulary": list(known),
            "model": {"cell": "lstm", "hidden_size": 8, "num_layers": 1,
                      "dropout": 0.0}}  # fmt: skip
    checkpoint.save(tmp_path / "checkpoints" / "latest", model.state_dict(), {}, meta)
    outputs = {}
    for text in ("the cat\n", "the “cat”\n"):
        (tmp_path / "scored").write_text(text, encoding="utf-8")
        main([str(tmp_path), "--score", str(tmp_path / "scored")])
        outputs[text] = capsys.readouterr()
    plain, odd = outputs.values()
    assert plain.out == odd.out
    assert odd.err == "fastlstm.sample: --score: the model has never seen 6 bytes: skipped\n"
    assert plain.err == ""
    assert set(sampled(capsys, tmp_path, "-n", 50, "-t", 2)) <= set(known.decode())


def test_text_without_a_newline_needs_no_primer(tmp_path, capsys):
    run = train_on(tmp_path, "never a line ends here. " * 20, "--steps", "2")
    assert len(sampled(capsys, run, "-n", 10, "-t", 1)) == 11


def test_a_run_killed_while_it_replaced_its_checkpoint_still_samples(run, tmp_path, capsys):
    expected = sampled(capsys, run, "-n", 20, "--checkpoint", "latest")
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "latest").rename(copy / "checkpoints" / ".latest.old")
    assert sampled(capsys, copy, "-n", 20, "--checkpoint", "latest") == expected


def test_only_the_weights_and_their_description_are_needed(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "best" / "training.safetensors").unlink()
    assert sampled(capsys, copy, "-n", 20) == sampled(capsys, run, "-n", 20)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_text_does_not_depend_on_how_it_is_cut_into_calls(cell, weights):
    model = CharModel(11, cell, 16, 2, 0.0).eval()
    how = Draw(1.3, 7, 0.9, torch.tensor([5]))
    prime = torch.tensor([[3, 4], [5, 6]])
    whole, *cut = (
        torch.cat(list(sampling.stream(model, prime, 50, how, weights=weights, chunk=n)))
        for n in (50, 1, 7)
    )
    assert whole.shape == (50, 2)
    assert all(torch.equal(whole, other) for other in cut)


def test_rounded_models_draw_what_packed_weights_draw():
    """The same greedy text natively, and from a module of the weights as they read back."""
    model = CharModel(11, "lstm", 16, 2, 0.0).eval()
    prime, how = torch.tensor([[3]]), Draw(0.0)
    for weights in ("bf16", "int8"):
        other = sampling.rounded_model(model, weights)
        assert not torch.equal(other.rnn.weight_hh_l0, model.rnn.weight_hh_l0)
        assert torch.equal(other.rnn.weight_ih_l0, model.rnn.weight_ih_l0)
        a, b = (
            torch.cat(list(sampling.stream(m, prime, 40, how, weights=w)))
            for m, w in ((model, weights), (other, "fp32"))
        )
        assert torch.equal(a, b)


@given(text=st.text(max_size=30), stop=st.none() | st.text(min_size=1, max_size=3))
def test_bytes_become_the_same_text_however_they_come(text, stop):
    data = text.encode("utf-8", errors="replace")
    decoder = Decoder(stop)
    out = "".join(decoder.feed(data[j : j + 1]) for j in range(len(data)))
    out += decoder.feed(b"", final=True)
    whole = data.decode()
    assert out == (whole.split(stop)[0] if stop else whole)


def test_bytes_that_are_no_text_are_shown_as_such():
    decoder = Decoder()
    assert decoder.feed(b"a\xff\xc3") + decoder.feed(b"", final=True) == "a\ufffd\ufffd"


MISTAKES = {
    "no run": (["nowhere"], "nowhere is no run"),
    "no arguments": ([], "RUN"),
    "length": (["RUN", "-n", "0"], "-n: expected at least 1"),
    "no number": (["RUN", "-n", "x"], "invalid int value: 'x'"),
    "temperature": (["RUN", "-t", "-1"], "-t: expected"),
    "nan": (["RUN", "-t", "nan"], "-t: expected"),
    "top-p": (["RUN", "--top-p", "0"], "--top-p: expected"),
    "top-k": (["RUN", "--top-k", "0"], "--top-k: expected at least 1"),
    "seed": (["RUN", "--seed", "-1"], "--seed: expected"),
    "stop": (["RUN", "--stop", ""], "--stop: expected"),
    "checkpoint": (["RUN", "--checkpoint", "epoch-99"], "it has best, latest, epoch-1"),
    "two checkpoints": (["EPOCH", "--checkpoint", "best"], "is the checkpoint epoch-1"),
    "no such checkpoint": (["NONE"], "has no checkpoint 'epoch-99'; it has best, latest"),
    "path": (["RUN", "--checkpoint", "../checkpoints/best"], "has no checkpoint"),
    "weights": (["RUN", "--weights", "int4"], "invalid choice: 'int4'"),
    "score": (["RUN", "--score", "nowhere"], "cannot read nowhere"),
    "short score": (["RUN", "--score", os.devnull], "less than two characters"),
}


NAMES = {
    "RUN": str,
    "EPOCH": lambda run: str(run / "checkpoints" / "epoch-1"),
    "NONE": lambda run: str(run / "checkpoints" / "epoch-99"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_status_2(run, name, capsys):
    arguments, message = MISTAKES[name]
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([NAMES[a](run) if a in NAMES else a for a in arguments])
    assert error.value.code == 2
    printed, line = capsys.readouterr()
    assert line.count("\n") == 1
    assert message in line
    assert printed == ""


def test_text_streams_and_a_closed_pipe_is_no_traceback(run):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlstm.sample", run, "-n", "10000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert len(process.stdout.read(20)) == 20  # long before it would have drawn them all
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
