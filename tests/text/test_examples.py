"""The programs in examples/ do what they say, where the packages around them are there."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import fastlstm

FOLDER = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tried_here_and_shown_in_the_docs():
    names = {path.stem for path in FOLDER.glob("*.py")}
    here, page = Path(__file__).read_text(), (FOLDER.parent / "docs" / "examples.md").read_text()
    assert names
    for name in names:
        assert f'example("{name}")' in here
        assert f"literalinclude}} ../examples/{name}.py" in page


@pytest.mark.parametrize("frames", [1, 7, 10])
def test_a_stream_gives_what_the_whole_recording_gives(frames, capsys):
    streaming = example("streaming")
    model = streaming.Recogniser(hidden_size=24, num_layers=2).eval()
    recording = torch.randn(53, 3, streaming.FEATURES)
    chunks = list(streaming.recognise(model, recording.split(frames)))
    assert [len(chunk) for chunk in chunks] == [len(c) for c in recording.split(frames)]
    with torch.no_grad():
        whole, _ = model(recording)
    torch.testing.assert_close(torch.cat(chunks), whole, atol=1e-5, rtol=1e-5)
    assert streaming.main(seconds=0.5, frames_a_chunk=frames) > 0
    assert f"50 frames in chunks of {frames}: " in capsys.readouterr().out


def test_gradients_of_samples_are_those_of_one_sample_at_a_time():
    dp_sgd = example("dp_sgd")
    model = dp_sgd.Classifier()
    x, y = torch.randn(5, 7, 8), torch.randint(2, (7,))
    gradients = dp_sgd.sample_gradients(model, x, y)
    for j in range(7):
        loss = torch.nn.functional.cross_entropy(model(x[:, j : j + 1]), y[j : j + 1])
        one = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), expected in zip(model.named_parameters(), one, strict=True):
            torch.testing.assert_close(gradients[name][j], expected, atol=1e-6, rtol=1e-4)


def test_private_gradients_are_clipped_and_noisy():
    dp_sgd = example("dp_sgd")
    model = dp_sgd.Classifier()
    x, y = torch.randn(5, 7, 8), torch.randint(2, (7,))
    gradients = dp_sgd.sample_gradients(model, x, y)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    clip = flat.norm(dim=1).median().item()
    clipped = flat * (clip / flat.norm(dim=1)).clamp(max=1)[:, None]
    plain = dp_sgd.private_gradient(gradients, clip, noise=0.0)
    together = torch.cat([g.flatten() for g in plain.values()])
    torch.testing.assert_close(together, clipped.mean(0), atol=1e-6, rtol=1e-5)
    noisy = dp_sgd.private_gradient(gradients, clip, noise=5.0)
    noise = torch.cat([g.flatten() for g in noisy.values()]) - together
    assert noise.std().item() == pytest.approx(5.0 * clip / 7, rel=0.1)  # of 1,700 parameters


def test_private_training_learns():
    before, after = example("dp_sgd").main()
    assert after < 0.5 < before


def test_a_lightning_module_learns(tmp_path):
    pytest.importorskip("lightning")
    assert example("lightning_module").main(count=1024, folder=str(tmp_path)) > 0.8


def test_hugging_faces_trainer_trains_and_saves(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    module = example("huggingface_trainer")
    first, last = module.main(b"the quick brown fox, " * 100, steps=100, folder=str(tmp_path))
    assert first > 5
    assert last < 2.5
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "char-lstm"
    model = module.CharLSTM.from_pretrained(tmp_path).eval()
    assert isinstance(model.lstm, fastlstm.LSTM)
    text = torch.tensor([list(b"the quick brown fox, the quick brown fox, ")])
    assert model(text, labels=text).loss.item() < 2.5


def test_a_tokenizers_bits_are_those_of_its_bytes(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    tokenizer = example("tokenizer")
    text = "".join(f"Größe {j * 7919 % 97} €: the quick brown fox\n" for j in range(150))
    pairs = tokenizer.Pairs(text, 300)
    for encoding in (tokenizer.Bytes(), pairs):
        units = encoding.encode(text[:99])
        assert encoding.lengths(units).sum() == len(text[:99].encode())
    assert len(pairs.encode(text)) < len(text.encode()) / 2
    unknown = "日本\t\x00"  # the pairs were learned on a text that has none of these
    assert pairs.lengths(pairs.encode(unknown)).sum() == len(unknown.encode())

    model = tokenizer.Model(pairs.size, 8)
    units = pairs.encode(text)
    with torch.no_grad():
        p = model(units[:-1, None])[0][:, 0].double().log_softmax(-1)
    bits = -p.gather(1, units[1:, None]).sum().item() / math.log(2)
    size = len(text.encode()) - int(pairs.lengths(units)[0])
    assert tokenizer.bits_a_byte(model, units, pairs.lengths(units)) == pytest.approx(bits / size)

    (tmp_path / "text").write_text(text, encoding="utf-8")
    results = tokenizer.main(str(tmp_path / "text"), epochs=8, sizes=(300,))
    assert set(results) == {(256, None), (256, 32), (300, None), (300, 32)}
    assert max(results.values()) < 5  # from 8 bits of a blind guess
    assert capsys.readouterr().out.count(" bits a byte, ") == 4
