"""Tokens: a vocabulary of byte-level BPE, which a run learns and keeps, and losses by the byte."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

import legible
import tokenizers
from chromium import chromium, complaints
from hypothesis import example, given
from hypothesis import strategies as st
from inspected import block, inspected
from trainer import TINY, metrics, refused, train

import fastlstm
from fastlstm.compare import main as compare
from fastlstm.sample import main as sample
from fastlstm.text import UserError, alphabet, load
from fastlstm.text.alphabet import Alphabet, Tokens
from fastlstm.text.data import corpus, tokenized
from fastlstm.text.model import loss_nats

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = "the cat sat on the mat, the größte naïve cat 日本語;\n\tand then 12 more\n"
BPE = [*TINY, "--unit", "bpe", "--vocabulary", 320]
BITS = [b"the", b" the cat", b"  ", b"\n", b"\t", b"\x85", "ö日".encode(), b"12", b",;"]
ANY = (
    st.binary(max_size=200)
    | st.text(max_size=80).map(str.encode)
    | st.lists(st.sampled_from(BITS)).map(b"".join)
)


def learned(text=LINE * 20, size=320):
    return tokenized.learn(np.frombuffer(text.encode(), np.uint8), size)


KNOWN = learned()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(LINE * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(*BPE, "--data", text, "--out", folder, "--steps", 20, "--test-fraction", 0.05,
          "--sample-every", 10)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)


@given(text=ANY)
@example(text=bytes(range(256)))
@example(text=b"\xe6\x97")
def test_any_bytes_are_tokens_and_back(text):
    indices, unknown = KNOWN.encode(text)
    assert unknown == 0
    assert KNOWN.decode(indices[:, 0].tolist()) == text
    assert int(KNOWN.sizes[indices].sum()) == len(text)
    assert KNOWN.knows(text)


@given(text=ANY)
@example(text=b" " * 200 + b"x")
@example(text=b"a" * 200)
def test_tokens_are_those_of_the_package_that_learned_them(text):
    spelled = [token.decode("latin-1") for token in KNOWN.tokens]
    pairs = [(spelled[a], spelled[b]) for a, b in KNOWN.merges]
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: j for j, token in enumerate(spelled)}, pairs)
    )
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(alphabet.WORDS), "isolated"
    )
    wanted = theirs.encode(text.decode("latin-1")).ids
    assert KNOWN.encode(text)[0][:, 0].tolist() == wanted


@given(text=ANY, size=st.integers(1, 30))
def test_a_text_in_parts_has_the_same_tokens(text, size):
    """Lines are never joined, and what a part is does not depend on how the text was read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alphabet, "PART", size)
        pieces = [text[j : j + 7] for j in range(0, len(text), 7)]
        assert list(alphabet.parts_of(pieces)) == list(alphabet.parts_of([text]))
        assert b"".join(alphabet.parts_of(pieces)) == text
    whole = KNOWN.encode(text)[0]
    lines = [KNOWN.encode(line)[0] for line in re.findall(rb"[^\n]*\n|[^\n]+", text)]
    assert torch.equal(whole, torch.cat(lines) if lines else whole[:0])


def test_frequent_words_are_one_token_and_bytes_stay():
    assert KNOWN.tokens[:256] == [bytes([value]) for value in range(256)]
    assert {b" the", " größte".encode(), b" cat"} <= set(KNOWN.tokens)
    assert len(KNOWN.vocabulary) <= 320
    assert len(set(KNOWN.tokens)) == len(KNOWN.tokens)
    assert max(map(len, KNOWN.tokens)) <= alphabet.LONGEST
    assert learned() == KNOWN
    names = [KNOWN.name(j) for j in range(len(KNOWN.vocabulary))]
    assert names[10] == "newline"
    assert names[0xE6] == "0xE6"
    assert names[KNOWN.tokens.index(b" the")] == "␣the"


def test_the_vocabulary_is_learned_from_the_training_part_alone(tmp_path):
    path, begin, end = tmp_path / "text", LINE * 50, "zyzzyva " * 60
    path.write_text(begin + end, encoding="utf-8")
    size = len((begin + end).encode())
    fraction = (len(end) + 0.5) / size
    train(*BPE, "--data", path, "--out", tmp_path / "run", "--steps", 2, "--val-fraction", fraction)
    found = load(tmp_path / "run").alphabet
    assert found == learned(begin)
    assert not any(b"zy" in token for token in found.tokens)
    said = json.loads((tmp_path / "run" / "about.json").read_text())["text"]
    assert said["tokens to validate on"] == len(found.encode(end.encode())[0])
    assert said["tokens to train on"] == len(found.encode(begin.encode())[0])


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, text, run, monkeypatch):
    begun = tmp_path / "run"
    train(*BPE, "--data", text, "--out", begun, "--steps", 10, "--test-fraction", 0.05)
    monkeypatch.setattr(tokenized, "learn", None)  # it has its vocabulary
    train("--out", begun, "--resume", "--steps", 20)
    names = ("step", "epoch", "train_loss", "val_loss", "bits_per_byte", "val_bits_per_byte")
    assert [[line[name] for name in names] for line in metrics(begun)] == [
        [line[name] for name in names] for line in metrics(run)
    ]
    for name in ("model", "training"):
        file = f"checkpoints/latest/{name}.safetensors"
        assert (begun / file).read_bytes() == (run / file).read_bytes()


def test_another_run_begins_with_its_vocabulary_and_weights(tmp_path, run, monkeypatch):
    monkeypatch.setattr(tokenized, "learn", None)
    other = tmp_path / "text"
    other.write_text("quite another text, of other words\n" * 60)
    train(*TINY, "--data", other, "--out", tmp_path / "run", "--init-from", run, "--steps", 1,
          "--lr", "1e-12")  # fmt: skip
    mine, theirs = load(tmp_path / "run", "latest"), load(run)
    assert mine.alphabet == theirs.alphabet
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["unit"], config["vocabulary"]) == ("bpe", len(theirs.vocabulary))
    seen = theirs.meta["seen"]
    assert torch.equal(mine.model.rnn.weight_ih_l0[:, seen], theirs.model.rnn.weight_ih_l0[:, seen])


def test_the_score_is_the_sum_over_tokens_by_the_byte(run, tmp_path, capsys):
    model, data = load(run), (LINE * 3 + "ünseen wörds").encode()
    indices = model.alphabet.encode(data)[0]
    logits = model.logits(data)[:-1]
    nats = F.cross_entropy(logits, indices[1:, 0], reduction="sum").item()
    size = len(data) - len(model.alphabet.decode([int(indices[0])]))
    assert model.score(data) == pytest.approx(nats / (len(indices) - 1), rel=1e-5)
    bits = nats / math.log(2) / size
    assert model.bits_per_byte(data) == pytest.approx(bits, rel=1e-5)
    (tmp_path / "data").write_bytes(data)
    sample([str(run), "--score", str(tmp_path / "data")])
    line = rf"{nats / (len(indices) - 1):.4f} nats a token, {bits:.4f} bits a byte, perplexity "
    assert re.fullmatch(line + r"[\d.]+ a token\n", capsys.readouterr().out)


def test_every_unit_has_bits_a_byte(tmp_path, text):
    line = LINE.encode()
    for unit in ("byte", "char"):
        train(*TINY, "--data", text, "--unit", unit, "--out", tmp_path / unit, "--steps", 5)
        model = load(tmp_path / unit)
        symbols = len(line) if unit == "byte" else len(LINE)
        bits = model.score(line) * (symbols - 1) / math.log(2) / (len(line) - 1)
        assert model.bits_per_byte(line) == pytest.approx(bits, rel=1e-6)


def test_validation_counts_the_bytes_of_what_it_scores(run, text):
    data = text.read_bytes()
    tail, test = int(len(data) * 0.05), int(len(data) * 0.05)
    model = load(run, "latest")
    held = model.alphabet.encode(data[len(data) - tail - test : len(data) - test])[0][:, 0]
    windows = corpus.Streams(
        corpus.Corpus(held.numpy().astype(np.uint16), [], "", tokens=model.alphabet),
        0, len(held), min(64, (len(held) - 1) // 8), 8, True,
    )  # fmt: skip
    total = count = size = 0
    state = None
    with torch.no_grad():
        for j in range(windows.windows):
            x, y = windows.window(j)
            logits, state = model(x, state)
            total += loss_nats(logits, y).item() * y.numel()
            count += y.numel()
            size += sum(len(model.alphabet.tokens[j]) for j in y.flatten().tolist())
    last = metrics(run)[-1]
    assert last["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert windows.bytes_each == pytest.approx(size / count)


def test_what_a_run_says_names_tokens_and_bytes(tmp_path, text, capsys):
    train(*BPE, "--data", text, "--out", tmp_path / "run", "--steps", 10, "--test-fraction", 0.05)
    printed = capsys.readouterr().out
    both = r"(\d\.\d{4}) nats a token, (\d\.\d{4}) bits a byte"
    assert re.search(rf"validation {both}; training {both}; [\d,]+ tokens/s", printed)
    assert re.search(rf"\ntest: {both}\n", printed)
    assert re.search(rf"best validation {both}\n", printed)
    assert "tokens of text" in printed
    assert "bpc" not in printed
    assert "character" not in printed
    last = metrics(tmp_path / "run")[-1]
    assert not {"bpc", "chars_per_second"} & set(last)
    said = json.loads((tmp_path / "run" / "about.json").read_text())["text"]
    each = said["bytes a token to train on"]
    assert last["bits_per_byte"] == pytest.approx(last["train_loss"] / math.log(2) / each, rel=1e-5)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("bits a byte") >= 5
    assert "nats a character" not in page
    assert "bits a character" not in page


def test_runs_of_different_units_compare_by_the_byte(tmp_path, text, run, browser, capsys):
    for unit in ("byte", "char"):
        train(*TINY, "--data", text, "--unit", unit, "--out", tmp_path / unit, "--steps", 10)
    capsys.readouterr()
    runs = [run, tmp_path / "byte", tmp_path / "char"]
    compare([*map(str, runs), "--out", str(tmp_path / "page.html")])
    head, *rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[:4]]
    assert head[:2] == ["run", "best validation, bits a byte"]
    shown = {row[0]: float(row[1]) for row in rows}
    assert list(shown.values()) == sorted(shown.values())
    for folder in runs:
        best = min(line["val_loss"] for line in metrics(folder) if line["val_loss"])
        said = json.loads((folder / "about.json").read_text())["text"]
        sizes = [v for k, v in said.items() if re.match("bytes a .* to validate on", k)]
        wanted = best / math.log(2) / (sizes or [1])[0]
        assert shown[folder.name] == pytest.approx(wanted, abs=6e-5)
    page = (tmp_path / "page.html").read_text()
    assert "nats a character" not in page
    assert "Losses are in bits a byte" in page
    legible.check(browser, tmp_path / "page.html")
    browser.find_element("id", "by-bytes").click()
    assert browser.find_element("id", "validation-bytes").is_displayed()
    assert complaints(browser) == []
    (run / "about.json").rename(tmp_path / "about.json")
    try:
        with pytest.raises(SystemExit):
            compare([*map(str, runs), "--out", str(tmp_path / "page.html")])
    finally:
        (tmp_path / "about.json").rename(run / "about.json")
    assert "does not say how many bytes the run's tokens have" in capsys.readouterr().err


def test_samples_are_drawn_and_streamed_without_the_package(run, capsys, without_the_package):
    model = load(run)
    text = model.sample(300, primer="日本", temperature=2.0, seed=1)
    assert text.startswith("日本")
    sample([str(run), "-n", "300", "-t", "2", "--seed", "1", "-p", "日本"])
    assert capsys.readouterr().out == text + "\n"
    stop = text[100:103]
    assert model.sample(300, primer="日本", temperature=2.0, seed=1, stop=stop) == (
        "日本" + text[2:].split(stop)[0]
    )
    sample([str(run), "-n", "20", "--batch", "2"])
    assert capsys.readouterr().out.count("--- ") == 2


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    known = Tokens.learned([[0xE6, 0x97], [256, 0xA5]])  # the three bytes of 日
    for numbers in ([0xE6, 0x97, 0xA5], [256, 0xA5], [257]):
        decoder = alphabet.Decoder()
        pieces = [decoder.feed(known.decode([j])) for j in numbers]
        assert pieces == [""] * (len(numbers) - 1) + ["日"]
    assert known.encode("日".encode())[0].tolist() == [[257]]


def test_a_shared_model_has_its_vocabulary(run, tmp_path, without_the_package, capsys):
    pytest.importorskip("huggingface_hub")
    model = load(run)
    model.save_pretrained(tmp_path / "shared")
    same = fastlstm.text.TextModel.from_pretrained(tmp_path / "shared")
    assert same.alphabet == model.alphabet
    assert same.sample(50, primer="the") == model.sample(50, primer="the")
    sample([str(tmp_path / "shared"), "-n", "50", "-p", "the"])
    assert capsys.readouterr().out == model.sample(50, primer="the") + "\n"


def test_the_missing_package_is_named_before_there_is_a_folder(
    tmp_path, text, run, capsys, without_the_package
):
    said = refused(capsys, *BPE, "--data", text, "--out", tmp_path / "run")
    assert "--unit bpe: tokenizers, which" in said
    assert "pip install 'fastlstm[bpe]'" in said
    assert not (tmp_path / "run").exists()
    train(*TINY, "--data", text, "--init-from", run, "--out", tmp_path / "more", "--steps", 1)
    train("--out", tmp_path / "more", "--resume", "--steps", 2)  # neither learns one


def test_a_vocabulary_is_for_tokens(tmp_path, text, run, capsys):
    byte = tmp_path / "byte"
    train(*TINY, "--data", text, "--out", byte, "--steps", 1)
    assert "vocabulary" not in json.loads((byte / "config.json").read_text())
    new = ["--data", text, "--out", tmp_path / "new"]
    for arguments, said in (
        ([*new, "--vocabulary", 300], "--vocabulary 300: only --unit bpe learns one, the unit is"),
        ([*new, "--unit", "char", "--vocabulary", 300], "the unit is char"),
        ([*new, "--unit", "bpe", "--vocabulary", 256], "--vocabulary: expected at least 257"),
        ([*new, "--unit", "bpe", "--vocabulary", 70000], "--vocabulary: expected a number below"),
        (["--out", run, "--resume", "--vocabulary", 300], "disagrees with the run to resume"),
        (["--out", byte, "--resume", "--vocabulary", 300], "disagrees with the run to resume"),
        ([*new, "--init-from", run, "--vocabulary", 270], f"{run} has vocabulary "),
        ([*new, "--init-from", byte, "--unit", "bpe"], f"{byte} has unit byte"),
    ):
        assert said in refused(capsys, *arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "merges",
    [None, 3, [[1]], [[1, 2, 3]], [["a", 1]], [[1, 256]], [[-1, 0]], [[97, 98]] * 2,
     [[97 if j == 0 else 255 + j, 97 if j == 0 else 255 + j] for j in range(40)]],
)  # fmt: skip
def test_what_is_no_vocabulary_is_refused(run, tmp_path, merges, text):
    meta = {"unit": "bpe", "vocabulary": list(range(258)), "merges": merges}
    assert not Alphabet.valid(meta)
    assert Alphabet.valid({**meta, "merges": [[97, 98], [256, 99]]})
    place = run / "checkpoints" / "latest" / "meta.json"
    before = place.read_text()
    try:
        place.write_text(json.dumps({**json.loads(before), "merges": merges}))
        with pytest.raises(UserError, match="describes no model of ours"):
            load(run, "latest")
        with pytest.raises(SystemExit):
            train("--out", run, "--resume", "--steps", 40)
    finally:
        place.write_text(before)


def test_inside_a_run_every_token_is_one_coloured_piece(run, tmp_path, browser, capsys):
    from selenium.webdriver import Keys

    data = (LINE * 4).encode() + b"\xff\xe6\x97"
    page = inspected(run, tmp_path, data)
    assert "as close by chance" in capsys.readouterr().out or "No cell follows" in page
    model = load(run)
    known, indices = model.alphabet, model.alphabet.encode(data)[0]
    likely = model.logits(data)[:-1].log_softmax(-1).gather(1, indices[1:])[:, 0].double()
    bits = [0.0, *(-likely / math.log(2)).tolist()]
    pieces, sums, held, amount = [], [], b"", 0.0
    for token, surprise in zip(indices[:, 0].tolist(), bits, strict=True):
        held, amount = held + known.tokens[token], amount + surprise
        try:
            pieces.append(held.decode())
        except UnicodeDecodeError:
            continue
        sums.append(amount)
        held, amount = b"", 0.0
    assert len(pieces) < len(data) / 2  # tokens, not bytes
    browser.get((tmp_path / "page.html").as_uri())
    script = "return [...document.querySelectorAll('#text span')].map(m => m.textContent)"
    shown = browser.execute_script(script)
    assert shown[: len(pieces)] == pieces
    assert "".join(shown) == data.decode("utf-8", "replace")
    found = block(page, "bits", np.uint16) / 100
    assert len(found) == len(shown)
    np.testing.assert_allclose(found[: len(sums)], sums, atol=0.006)
    size = len(data) - len(known.tokens[int(indices[0])])
    said = browser.find_element("css selector", ".cards dd").text
    assert said.startswith(f"{sum(bits) / size:.3f} bits a byte")
    assert "nats a token" in said
    browser.find_element("id", "text").send_keys(Keys.HOME, Keys.RIGHT)
    assert browser.find_element("id", "value").text.startswith(json.dumps(pieces[1]) + " at 1; ")
    expected = browser.find_elements("css selector", "#expected li span:first-child")
    best = model.logits(data)[0].topk(5).indices.tolist()
    assert [e.text for e in expected] == [known.name(j) for j in best]
    assert complaints(browser) == []
    legible.check(browser, tmp_path / "page.html")


def test_the_page_of_a_run_of_tokens_is_whole(run, browser):
    browser.get((run / "report.html").as_uri())
    cards = browser.find_element("css selector", ".cards").text
    assert re.search(r"tokens a second", cards)
    assert re.search(
        r"best validation loss\n\d\.\d{3} bits\s+a byte; \d\.\d{3} nats a token", cards
    )
    labels = [e.text for e in browser.find_elements("css selector", "#linear svg text")]
    assert "bits a byte" in labels
    assert complaints(browser) == []
    legible.check(browser, run / "report.html")
