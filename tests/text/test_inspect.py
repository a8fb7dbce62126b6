"""Looking into a run's cells: the page shows the model's own numbers and works in a browser."""

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

import legible
from chromium import chromium, complaints
from inspected import TEXT, block, inspected, probe_model, random_model, saved, values

import fastlstm
from fastlstm.inspect import main
from fastlstm.text import probe
from fastlstm.text.alphabet import Alphabet
from fastlstm.text.pages import heatmap


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint, untrained, of bytes."""
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("inspect"), "byte", sorted(set(TEXT.encode()) | {0xFF}))


def test_cells_that_learned_something_are_named_and_no_others(run, tmp_path, capsys):
    page = inspected(run, tmp_path)
    printed = capsys.readouterr().out
    by_chance = r"; as close by chance in [01]\.\d\d% of [\d,]+ rolls\n"
    assert re.search(r"position in the line: layer 0, cell 0 \(\+1\.00\)" + by_chance, printed)
    assert "no cell stands out from those of an untrained model or from chance: " in printed
    assert (tmp_path / "page.html").as_uri() in printed
    assert "<h2>The most interpretable cells</h2>" in page
    assert re.search(r"No cell follows these closely enough: [a-z ,]*inside quotes", page)
    assert re.search(r"as close by chance: \d+ of \d+ rolls", page)
    assert "no more than 2 in a hundred rolls" in page


COLOURS = """return [...document.querySelectorAll('#text span')].map(
    m => [m.textContent, m.style.backgroundColor])"""


def colours(browser):
    return browser.execute_script(COLOURS)


def choose(browser, view):
    browser.execute_script(f"get('view').value = '{view}'; "
                           "get('view').dispatchEvent(new Event('change'))")  # fmt: skip


def test_the_page_colours_the_text_by_any_cell(run, tmp_path, browser):
    page = inspected(run, tmp_path)
    browser.get((tmp_path / "page.html").as_uri())
    assert "".join(c for c, _ in colours(browser)) == TEXT
    choose(browser, "cells")
    first = int(browser.execute_script("return known.first"))
    check_colours(colours(browser), values(page)[first])
    browser.find_element("id", "after").click()
    browser.execute_script("get('layer').value = 1; get('cell').value = 2; asked()")
    check_colours(colours(browser), values(page)[7])
    button = browser.find_element("css selector", ".ranking section:last-child li button")
    layer, cell = re.findall(r"\d+", button.text)
    button.click()
    assert browser.find_element("id", "cell").get_attribute("value") == cell
    assert browser.find_element("id", "layer").get_attribute("value") == layer
    assert "r = " in browser.find_element("id", "about").text
    assert "No cell follows these closely enough" in browser.find_element("tag name", "main").text
    assert len(browser.find_elements("css selector", ".plots svg")) == 6  # 3 gates, 2 layers
    assert len(browser.find_elements("css selector", "circle")) == 30
    assert complaints(browser) == []


def test_the_page_colours_the_text_by_any_gate(run, tmp_path, browser):
    page = inspected(run, tmp_path)
    browser.get((tmp_path / "page.html").as_uri())
    model, vocabulary = probe_model(run)
    indices = torch.tensor([[vocabulary.index(b)] for b in TEXT.encode()])
    reading = probe.read(model, indices, keep=len(indices))
    at = np.cumsum([len(c.encode()) for c in TEXT]) - 1
    for gate in ("input", "forget", "output"):
        expected = 255 * reading.gates[gate].numpy()[at].reshape(len(TEXT), -1).T
        assert abs(values(page, view=gate) - expected).max() <= 0.51
        choose(browser, gate)
        browser.execute_script("get('layer').value = 1; get('cell').value = 3; asked()")
        strengths = [float(re.search(r"--plus\), ([\d.]+)", colour)[1])
                     for _, colour in colours(browser)]  # fmt: skip
        np.testing.assert_allclose(strengths, 0.85 * expected[8] / 255, atol=0.008)
    assert complaints(browser) == []


def test_the_page_opens_with_the_surprise_at_every_character(run, tmp_path, browser):
    """Of a model of bytes a character's is the sum over its bytes."""
    page = inspected(run, tmp_path)
    model, vocabulary = probe_model(run)
    indices = torch.tensor([[vocabulary.index(b)] for b in TEXT.encode()])
    with torch.no_grad():
        likely = model(indices)[0][:-1, 0].log_softmax(-1).gather(1, indices[1:])[:, 0]
    bits = np.array([0.0, *(-likely / np.log(2))])
    sizes = [len(c.encode()) for c in TEXT]
    assert max(sizes) == 2
    expected = [part.sum() for part in np.split(bits, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(block(page, "bits", np.uint16) / 100, expected, atol=0.006)
    browser.get((tmp_path / "page.html").as_uri())
    strengths = [float(re.search(r"--surprise\), ([\d.]+)", colour)[1])
                 for _, colour in colours(browser)]  # fmt: skip
    wanted = 0.85 * np.minimum(1, np.array(expected) / 8)
    np.testing.assert_allclose(strengths, wanted, atol=0.006)
    assert not browser.find_element("id", "unit").is_displayed()


@pytest.mark.parametrize("way", ["pointer", "keyboard", "touch"])
def test_the_likeliest_characters_are_told_of_any_character(run, tmp_path, browser, way):
    from selenium.webdriver import ActionChains, Keys

    inspected(run, tmp_path)
    browser.get((tmp_path / "page.html").as_uri())
    mark = browser.find_elements("css selector", "#text span")[5]
    if way == "pointer":
        ActionChains(browser).move_to_element(mark).perform()
    elif way == "keyboard":
        text = browser.find_element("id", "text")
        text.send_keys(Keys.HOME, *[Keys.RIGHT] * 6, Keys.LEFT)
    else:
        browser.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerdown', "
                               "{ pointerType: 'touch', bubbles: true }))", mark)  # fmt: skip
    said = browser.find_element("id", "value").text
    assert said.startswith(f'"{TEXT[5]}" at 5; ')
    model, vocabulary = probe_model(run)
    indices = torch.tensor([[vocabulary.index(b)] for b in TEXT[:7].encode()])
    with torch.no_grad():
        likely = model(indices)[0][:, 0].softmax(-1)
    assert float(said.split("; ")[1].split()[0]) == pytest.approx(
        -np.log2(likely[4, indices[5, 0]].item()), abs=0.006
    )
    for where, place in (("expected", 4), ("next", 5)):
        rows = browser.find_elements("css selector", f"#{where} li")
        best = likely[place].topk(5)
        shares = [float(row.text.split()[-1].rstrip("%")) / 100 for row in rows]
        np.testing.assert_allclose(shares, best.values, atol=0.006)
        came = [row.get_attribute("class") == "came" for row in rows]
        assert came == [j == indices[place + 1, 0] for j in best.indices]
    assert len(browser.find_elements("css selector", "#text span.at")) == 1


def test_up_and_down_move_between_lines(run, tmp_path, browser):
    from selenium.webdriver import Keys

    inspected(run, tmp_path)
    browser.get((tmp_path / "page.html").as_uri())
    text = browser.find_element("id", "text")
    places = []
    for key in (Keys.HOME, Keys.DOWN, Keys.DOWN, Keys.UP, Keys.END, Keys.RIGHT):
        text.send_keys(key)
        places.append(browser.execute_script("return at"))
    second = TEXT.index("\n") + 1
    third = TEXT.index("\n", second) + 1
    assert places == [0, second, third, second, len(TEXT) - 1, len(TEXT) - 1]


def test_the_gallery_shows_every_cell_and_every_gate(run, tmp_path, browser):
    inspected(run, tmp_path)
    browser.get((tmp_path / "page.html").as_uri())
    pictures = browser.find_elements("css selector", "#gallery button")
    assert [p.text for p in pictures] == [f"layer {j // 5}, cell {j % 5}" for j in range(10)]
    pictures[7].click()
    assert browser.execute_script("return [view, chosen]") == ["cells", 7]
    assert pictures[7].get_attribute("aria-pressed") == "true"
    browser.execute_script("get('pictures').value = 'forget'; get('order').value = 'variation'; "
                           "hang()")  # fmt: skip
    order = browser.execute_script(
        "return [...get('gallery').children].map(b => Number(b.dataset.cell))"
    )
    spread = values((tmp_path / "page.html").read_text(), view="forget").astype(float).var(axis=1)
    assert sorted(order) == list(range(10))
    assert (np.diff(spread[order]) <= 1e-9).all()
    browser.find_element("css selector", "#gallery button").click()
    assert browser.execute_script("return [view, chosen]") == ["forget", order[0]]
    browser.execute_script("get('gallery').scrollIntoView()")
    painted = """return [...document.querySelectorAll('#gallery canvas')].filter(
        c => c.getContext('2d').getImageData(0, 0, 1, 1).data[3] >= 40).length;"""
    deadline = time.monotonic() + 20
    while browser.execute_script(painted) < 10:  # they are as they come into sight
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert complaints(browser) == []


def test_the_page_is_legible_as_it_is_used(run, tmp_path, browser):
    """The darkest colours included: a character that is certain, and a gate that is open."""
    inspected(run, tmp_path)
    try:
        for theme, width in legible.SIZES:
            legible.appear(browser, theme, width)
            browser.get((tmp_path / "page.html").as_uri())
            browser.execute_script("bits.fill(65535)")
            for kind in ("cells", "input", "surprise"):
                browser.execute_script("values.input?.fill(255); move(9);")
                choose(browser, kind)
                assert not (found := legible.faint(browser)), (theme, width, kind, found)
                assert legible.sideways(browser) <= 0
            for level in (1, 255):
                browser.execute_script(f"values.cells.fill({level})")
                choose(browser, "cells")
                assert not (found := legible.faint(browser)), (theme, width, level, found)
    finally:
        legible.reset(browser)


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


def test_a_checkpoints_folder_is_as_good_as_its_run(run, tmp_path):
    """And the page goes beside the run's other files: a checkpoint's folder is soon replaced."""
    path = tmp_path / "text"
    path.write_text(TEXT)
    page = run / "inspect.html"
    main([str(run / "checkpoints" / "latest"), "--text", str(path)])
    assert "<h1>Inside run</h1>" in page.read_text()
    page.unlink()


def test_texts_of_any_kind(run, tmp_path, monkeypatch):
    assert values(inspected(run, tmp_path, b"x\xffx\xff\xffx")).shape == (10, 6)
    assert "\ufffd" in (tmp_path / "page.html").read_text()
    assert values(inspected(run, tmp_path, TEXT, "-n", "9")).shape == (10, 9)
    assert values(inspected(run, tmp_path, TEXT[:9], "-n", str(10**30))).shape == (10, 9)
    assert values(inspected(run, tmp_path, TEXT, "--shown", "7")).shape == (10, 7)
    characters = saved(tmp_path, "char", sorted({ord(c) for c in TEXT} | {10}))
    assert values(inspected(characters, tmp_path, TEXT)).shape == (10, len(TEXT))
    monkeypatch.setattr(sys.modules["fastlstm.inspect"], "VALUES", 20 * 10 * 4)
    assert values(inspected(run, tmp_path)).shape == (10, 20)


def test_what_a_model_does_not_know_is_not_on_the_page(run, tmp_path, capsys):
    """Models of bytes once knew only those of their text: a character counts once."""
    known = values(inspected(run, tmp_path, "f(é)\n"))
    assert np.array_equal(values(inspected(run, tmp_path, "Zf(éž“)\nZ")), known)
    line = "fastlstm.inspect: --text: the model has never seen 4 characters: skipped\n"
    assert capsys.readouterr().err == line


def test_a_page_of_a_model_without_gates():
    few = np.zeros((2, 5))
    view = heatmap.View(
        name="<b>", text="t", model="m", length=2, nats=1.0, bits_each=1.4, pieces=["a", "b"],
        cells=np.zeros((2, 1, 3)), gates={}, bits=np.zeros(2), likeliest=few, probabilities=few,
        came=np.zeros(2), alphabet=Alphabet("char", [97, 98]), ranking=[], others=["a property"],
        rolls={"a property": np.ones(2)}, fresh={"a property": 0.5}, closed={}, open={},
    )  # fmt: skip
    page = heatmap.heatmap(view)
    assert "<h2>No cell stands out</h2>" in page
    assert "closely enough: a property.<" in page
    assert "interpretable" not in page
    assert "Saturation" not in page
    assert "<b>" not in page.split("<body>")[1]
    assert (values(page, 3) == 128).all()


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_pages_of_other_cells(tmp_path, browser, cell):
    vocabulary = sorted(set(TEXT.encode()))
    saved(tmp_path, "byte", vocabulary, random_model(cell, len(vocabulary)))
    inspected(tmp_path / "run", tmp_path)
    browser.get((tmp_path / "page.html").as_uri())
    views = browser.execute_script("return known.views")
    assert views == ["cells", *["reset", "update"] * (cell == "gru")]
    for view in views:
        choose(browser, view)
    assert complaints(browser) == []


def test_the_page_is_legible_everywhere(run, tmp_path, browser):
    """Light and dark, narrow and wide, whatever colour a character has."""
    inspected(run, tmp_path)
    legible.check(browser, tmp_path / "page.html")
    assert complaints(browser) == []


def test_the_example_of_the_documentation_works(browser):
    """docs/looking-inside.md shows the commands that made it."""
    pages = list((Path(fastlstm.__file__).parents[1] / "docs" / "examples").iterdir())
    assert pages
    for page in pages:
        legible.check(browser, page)
        choose(browser, "forget")
        browser.find_element("css selector", ".ranking button").click()
        assert complaints(browser) == []


MISTAKES = {
    "no run": (["nowhere", "--text", "TEXT"], "nowhere is no run"),
    "no text": (["RUN"], "--text"),
    "missing text": (["RUN", "--text", "nowhere"], "--text: cannot read nowhere"),
    "zero byte": (["RUN", "--text", "a\0b"], "--text: cannot read"),
    "short": (["RUN", "--text", "SHORT"], "holds less than two characters"),
    "length": (["RUN", "--text", "TEXT", "-n", "1"], "-n: expected at least 2, got 1"),
    "shown": (["RUN", "--text", "TEXT", "--shown", "0"], "--shown: expected at least 1, got 0"),
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
