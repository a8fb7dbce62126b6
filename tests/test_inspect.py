"""Looking into a run's cells: the numbers are the model's own, and the page works in a browser."""

import base64
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

from chromium import chromium, complaints
from hypothesis import given
from hypothesis import strategies as st

from fastlstm.inspect import main
from fastlstm.text import checkpoint, heatmap, probe
from fastlstm.text.model import CharModel, loss_nats

TEXT = 'def f(x):\n    """Quoted \'text\' é."""\n    return (x, [x])  # it\'s </script>&amp;\n' * 6


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def random_model(cell, vocabulary=7, hidden_size=5):
    """Untrained, with weights large enough to saturate gates."""
    model = CharModel(vocabulary, cell, hidden_size, 2, 0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("cell", ["lstm", "torch-lstm", "gru", "rnn"])
def test_what_is_read_is_what_the_model_does(cell, monkeypatch):
    """Against the model called a character at a time; windows do not show."""
    monkeypatch.setattr(probe, "WINDOW", 8)
    model = random_model(cell)
    indices = torch.randint(7, (30, 1))
    found = probe.read(model, indices)
    hx, cells, logits = None, [], []
    with torch.no_grad():
        for t in range(30):
            step, hx = model(indices[t : t + 1], hx)
            logits.append(step)
            cells.append((hx[1].tanh() if "lstm" in cell else hx)[:, 0])
    torch.testing.assert_close(found.cells, torch.stack(cells), atol=1e-5, rtol=0)
    expected = loss_nats(torch.cat(logits)[:-1], indices[1:]).item()
    assert found.loss == pytest.approx(expected, abs=1e-5)
    names = {"lstm": "input forget output", "gru": "reset update"}.get(cell.split("-")[-1], "")
    assert list(found.open) == list(found.closed) == names.split()


def test_gates_are_counted_where_they_are_saturated():
    """A forget gate follows from two cells and the candidate only; so compute it by hand."""
    model = random_model("lstm")
    indices = torch.randint(7, (40, 1))
    found = probe.read(model, indices)
    rnn, h = model.rnn, torch.zeros(5)
    low = high = torch.zeros(15, dtype=torch.float64)
    with torch.no_grad():
        c = torch.zeros(5)
        for t in range(40):
            z = rnn.weight_ih_l0[:, indices[t, 0]] + rnn.bias_ih_l0 + rnn.bias_hh_l0
            i, f, g, o = (z + rnn.weight_hh_l0 @ h).chunk(4)
            gates = torch.cat([i, f, o]).sigmoid()
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            low, high = low + (gates < 0.1), high + (gates > 0.9)
    for part, expected in ((found.closed, low / 40), (found.open, high / 40)):
        assert expected.max() > 0.2
        assert torch.equal(torch.cat([part[n][0] for n in ("input", "forget", "output")]), expected)


def test_a_grus_gates_make_its_next_state():
    model = random_model("gru")
    _, hidden, gates, _ = probe._layers(model, torch.randint(7, (9, 1)), None)
    update, h = gates["update"], hidden
    assert ((h[1:] - update[1:] * h[:-1]).abs() <= (1 - update[1:]) + 1e-6).all()  # |n| <= 1


def test_properties_of_a_text():
    text = 'ab (c"d[" [x]\n  y # (it\'s\nz'
    found = probe.properties(text)
    assert found["position in the line"].tolist() == [*range(1, 14), 0, *range(1, 12), 0, 1]
    assert found["inside quotes"].nonzero()[0].tolist() == [5, 6, 7]
    assert found["bracket depth"][[2, 3, 7, 10, 12, 20]].tolist() == [0, 1, 1, 2, 1, 1]
    assert found["indentation of the line"][[0, 14, 15, 16, 18, 26]].tolist() == [0, 1, 2, 2, 2, 0]
    assert found["inside a # comment"].nonzero()[0].tolist() == list(range(18, 25))
    assert found["position in the word"][[0, 1, 2, 4, 16]].tolist() == [1, 2, 0, 1, 1]


@given(st.text(alphabet="a'\"\n ([#)]“”", max_size=80))
def test_properties_of_any_text_are_counts(text):
    for values in probe.properties(text).values():
        assert values.shape == (len(text),)
        assert (values >= 0).all()
        assert (values <= len(text)).all()


def test_the_ranking_finds_cells_that_were_made_for_a_property():
    kept = probe.properties(TEXT)
    cells = np.random.default_rng(0).normal(0, 1, (len(TEXT), 12)).astype(np.float32)
    cells[:, 3] = np.tanh(0.05 * kept["position in the line"])
    cells[:, 8] = 0.5 - kept["inside quotes"]
    cells[:, 5] = 0.25  # constant: no correlation
    found = dict(probe.ranking(cells, TEXT))
    assert found["position in the line"][0][0] == 3
    assert found["inside quotes"][0] == (8, pytest.approx(-1))
    assert all(cell != 5 or r == 0 for best in found.values() for cell, r in best)
    assert "inside a # comment" not in dict(probe.ranking(cells[:5], "abcde"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint, untrained, of bytes."""
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("inspect"), "byte", sorted(set(TEXT.encode()) | {0xFF}))


def saved(folder, unit, vocabulary):
    model = random_model("lstm", len(vocabulary))
    meta = {"format": 1, "step": 3, "position": 0, "epoch": 0, "unit": unit,
            "vocabulary": vocabulary,
            "model": {"cell": "lstm", "hidden_size": 5, "num_layers": 2,
                      "dropout": 0.0}}  # fmt: skip
    checkpoint.save(folder / "run" / "checkpoints" / "latest", model.state_dict(), {}, meta)
    return folder / "run"


def inspected(run, tmp_path, text=TEXT, *arguments):
    path = tmp_path / "text"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    main([str(run), "--text", str(path), "--out", str(tmp_path / "page.html"), *arguments])
    return (tmp_path / "page.html").read_text()


def values(page, cells=10):
    raw = re.search(r'id="values">([^<]*)<', page)[1]
    return np.frombuffer(base64.b64decode(raw), np.uint8).reshape(cells, -1)


def test_the_page_colours_the_text_by_any_cell(run, tmp_path, browser, capsys):
    page = inspected(run, tmp_path)
    printed = capsys.readouterr().out
    assert "inside quotes: layer " in printed
    assert (tmp_path / "page.html").as_uri() in printed
    browser.get((tmp_path / "page.html").as_uri())
    marks = browser.execute_script("return [...document.querySelectorAll('#text span')].map("
                                   "m => [m.textContent, m.style.backgroundColor])")  # fmt: skip
    assert "".join(c for c, _ in marks) == TEXT
    first = int(browser.execute_script("return known.first"))
    check_colours(marks, values(page)[first])
    browser.find_element("id", "after").click()
    browser.execute_script("get('layer').value = 1; get('cell').value = 2; asked()")
    marks = browser.execute_script("return [...document.querySelectorAll('#text span')].map("
                                   "m => [m.textContent, m.style.backgroundColor])")  # fmt: skip
    check_colours(marks, values(page)[7])
    button = browser.find_element("css selector", ".ranking section:last-child li button")
    layer, cell = re.findall(r"\d+", button.text)
    button.click()
    assert browser.find_element("id", "cell").get_attribute("value") == cell
    assert browser.find_element("id", "layer").get_attribute("value") == layer
    assert "r = " in browser.find_element("id", "about").text
    assert len(browser.find_elements("css selector", ".plots svg")) == 6  # 3 gates, 2 layers
    assert len(browser.find_elements("css selector", "circle")) == 30
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert complaints(browser) == []


def check_colours(marks, expected):
    for (_, colour), v in zip(marks, expected, strict=True):
        sign, strength = re.fullmatch(r"rgba\(var\(--(\w+)\), ([\d.]+)\)", colour).groups()
        number = (int(v) - 128) / 127
        assert (sign == "minus") == (number < 0)
        assert float(strength) == pytest.approx(0.85 * abs(number), abs=0.006)


def test_values_are_the_cells_after_each_characters_last_byte(run, tmp_path):
    text = "é('x')\n" * 3
    found = values(inspected(run, tmp_path, text))
    assert found.shape == (10, len(text))
    net, vocabulary = probe_model(run)
    indices = torch.tensor([[vocabulary.index(b)] for b in text.encode()])
    cells = probe.read(net, indices).cells.flatten(1)
    at = np.cumsum([len(c.encode()) for c in text]) - 1
    expected = (cells[at].T * 127).round() + 128
    assert np.abs(found - expected.numpy()).max() <= 1


def probe_model(run):
    from fastlstm.text.run import load_model

    return load_model(run, "latest")[:2]


def test_texts_of_any_kind(run, tmp_path, monkeypatch):
    assert values(inspected(run, tmp_path, b"x\xffx\xff\xffx")).shape == (10, 6)
    assert "\ufffd" in (tmp_path / "page.html").read_text()
    assert values(inspected(run, tmp_path, TEXT, "-n", "9")).shape == (10, 9)
    characters = saved(tmp_path, "char", sorted({ord(c) for c in TEXT}))
    assert values(inspected(characters, tmp_path, TEXT)).shape == (10, len(TEXT))
    monkeypatch.setattr(sys.modules["fastlstm.inspect"], "SHOWN", 20)
    assert values(inspected(run, tmp_path)).shape == (10, 20)


def test_what_a_model_does_not_know_is_not_on_the_page(run, tmp_path, capsys):
    """Models of bytes once knew only those of their text: a character counts once."""
    known = values(inspected(run, tmp_path, "f(é)\n"))
    assert np.array_equal(values(inspected(run, tmp_path, "Zf(éž“)\nZ")), known)
    line = "fastlstm.inspect: --text: the model has never seen 4 characters: skipped\n"
    assert capsys.readouterr().err == line


def test_a_page_of_a_model_without_gates():
    view = heatmap.View("<b>", "t", "ab", np.zeros((2, 1, 3)), [], {}, {}, "read")
    page = heatmap.heatmap(view)
    assert "Saturation" not in page
    assert "<b>" not in page
    assert (values(page, 3) == 128).all()


MISTAKES = {
    "no run": (["nowhere", "--text", "TEXT"], "nowhere is no run"),
    "no text": (["RUN"], "--text"),
    "missing text": (["RUN", "--text", "nowhere"], "--text: cannot read nowhere"),
    "zero byte": (["RUN", "--text", "a\0b"], "--text: cannot read"),
    "short": (["RUN", "--text", "SHORT"], "holds less than two characters"),
    "length": (["RUN", "--text", "TEXT", "-n", "1"], "-n: expected at least 2, got 1"),
    "unseen": (["RUN", "--text", "ODD"], "less than two characters that the model knows"),
    "checkpoint": (["RUN", "--text", "TEXT", "--checkpoint", "epoch-9"], "it has latest"),
    "out": (["RUN", "--text", "TEXT", "--out", "/dev/null/x"], "--out: cannot write /dev/null/x"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_status_2(run, tmp_path, name, capsys):
    arguments, message = MISTAKES[name]
    for key, content in (("TEXT", TEXT), ("SHORT", "x"), ("ODD", "xZ")):
        (tmp_path / key).write_text(content)
    names = {"RUN": run, **{key: tmp_path / key for key in ("TEXT", "SHORT", "ODD")}}
    with pytest.raises(SystemExit) as error:
        main([str(names.get(a, a)) for a in arguments])
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert message in line
    assert not (run / "inspect.html").exists()
