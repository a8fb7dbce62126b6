"""Looking into a run's cells: the numbers are the model's own, and the page works in a browser."""

import base64
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

from chromium import chromium, complaints
from hypothesis import given
from hypothesis import strategies as st

from fastlstm.inspect import main
from fastlstm.text import checkpoint, probe
from fastlstm.text.model import CharModel, loss_nats
from fastlstm.text.pages import heatmap, markup

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


def test_a_property_stands_out_where_training_made_a_cell_follow_it():
    """Untrained models are the measure; a short text asks for more."""

    def ranking(quotes, line):
        return [("inside quotes", [(3, quotes), (1, 0.1)]), ("position in the line", [(0, line)])]

    chance = [ranking(0.3, -0.5), ranking(-0.35, 0.4)]
    for quotes, length, out in (
        (-0.8, 20_000, True), (0.4, 20_000, False), (0.52, 20_000, True), (0.52, 300, False),
        (0.8, 300, True), (0.3, 20_000, False), (1.0, 20_000, True),
    ):  # fmt: skip
        kept, others = probe.standing_out(ranking(quotes, 0.5), chance, length)
        assert kept == ([("inside quotes", [(3, quotes)])] if out else [])
        assert others == ["inside quotes"] * (not out) + ["position in the line"]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_no_cell_of_an_untrained_model_stands_out(cell):
    torch.manual_seed(17)
    model = CharModel(128, cell, 24, 2, 0.0).eval()
    text = Path(probe.__file__).read_text()[:3000]
    indices = torch.tensor(list(text.encode("ascii")))[:, None]

    def ranked(other):
        return probe.ranking(probe.read(other, indices).cells.numpy().reshape(len(text), -1), text)

    others = list(probe.untrained(model, {"cell": cell, "hidden_size": 24, "num_layers": 2,
                                          "dropout": 0.0}))  # fmt: skip
    assert len(others) == probe.UNTRAINED
    assert not torch.equal(others[0].decoder.weight, others[1].decoder.weight)
    kept, names = probe.standing_out(ranked(model), [ranked(other) for other in others], len(text))
    assert kept == []
    assert {"inside quotes", "position in the line"} <= set(names)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint, untrained, of bytes."""
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("inspect"), "byte", sorted(set(TEXT.encode()) | {0xFF}))


def counting(model, newline):
    """Have cell 0 of the first layer count the characters of a line."""
    rnn, h = model.rnn, model.rnn.hidden_size
    with torch.no_grad():
        for gate in range(4):
            for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                getattr(rnn, name)[gate * h] = 0
        rnn.bias_ih_l0[[0, h]] = 20.0  # the input and the forget gate stand open
        rnn.weight_ih_l0[[0, h], newline] = -40.0  # but for a newline
        rnn.bias_ih_l0[2 * h] = 0.02
    return model


def saved(folder, unit, vocabulary):
    model = counting(random_model("lstm", len(vocabulary)), vocabulary.index(10))
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


def test_cells_that_learned_something_are_named_and_no_others(run, tmp_path, capsys):
    page = inspected(run, tmp_path)
    printed = capsys.readouterr().out
    assert "position in the line: layer 0, cell 0 (+1.00)" in printed
    assert "no cell stands out from those of an untrained model: " in printed
    assert (tmp_path / "page.html").as_uri() in printed
    assert "<h2>The most interpretable cells</h2>" in page
    assert re.search(r"No cell follows these more closely .*: [a-z ,]*inside quotes", page)


def test_the_page_colours_the_text_by_any_cell(run, tmp_path, browser):
    page = inspected(run, tmp_path)
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
    assert "No cell follows these more closely" in browser.find_element("tag name", "main").text
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
    from fastlstm.text.opening import load_model

    return load_model(run, "latest")[:2]


def test_a_checkpoints_folder_is_as_good_as_its_run(run, tmp_path):
    """And the page goes beside the run's other files: a checkpoint's folder is soon replaced."""
    path = tmp_path / "text"
    path.write_text(TEXT)
    page = run / "inspect.html"
    main([str(run / "checkpoints" / "latest"), "--text", str(path)])
    assert "<h1>Cells of run</h1>" in page.read_text()
    page.unlink()


def test_texts_of_any_kind(run, tmp_path, monkeypatch):
    assert values(inspected(run, tmp_path, b"x\xffx\xff\xffx")).shape == (10, 6)
    assert "\ufffd" in (tmp_path / "page.html").read_text()
    assert values(inspected(run, tmp_path, TEXT, "-n", "9")).shape == (10, 9)
    characters = saved(tmp_path, "char", sorted({ord(c) for c in TEXT} | {10}))
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
    view = heatmap.View("<b>", "t", "ab", np.zeros((2, 1, 3)), [], ["a property"], {}, {}, "read")
    page = heatmap.heatmap(view)
    assert "<h2>No cell stands out</h2>" in page
    assert "untrained model: a property.<" in page
    assert "interpretable" not in page
    assert "Saturation" not in page
    assert "<b>" not in page
    assert (values(page, 3) == 128).all()


def luminance(rgb):
    """As WCAG 2 defines it, of sRGB from 0 to 255."""
    parts = [c / 255 for c in rgb]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(theme):
    """WCAG asks for a contrast of 4.5; black on white has 21."""
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)

    def colour(name):
        found = re.findall(rf"--{name}: ([^;]+);", markup.STYLE)[theme]
        if "," in found:
            return [int(c) for c in found.split(",")]
        digits = found[1:] if len(found) == 7 else "".join(2 * c for c in found[1:])
        return list(bytes.fromhex(digits))

    most = float(re.search(r"\(([\d.]+) \* Math\.abs\(v\)\)", heatmap.SCRIPT)[1])
    assert "var(--muted)" not in heatmap.STYLE.split("#choice")[0]  # newlines, with the text
    text, card = colour("fg"), colour("card")
    for name in ("plus", "minus"):
        for step in range(101):
            alpha = most * step / 100
            mixed = [alpha * c + (1 - alpha) * b for c, b in zip(colour(name), card, strict=True)]
            assert contrast(text, mixed) >= 4.5, (name, alpha)
    for ink in ("muted", "one", "two"):
        for ground in ("bg", "card"):
            assert contrast(colour(ink), colour(ground)) >= 4.5, (ink, ground)


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
