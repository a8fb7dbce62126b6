"""Runs laid over each other: every figure is the runs' own, and the page works in a browser."""

import json
import math
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("safetensors")

import legible
from chromium import chromium, complaints
from trainer import train

from fastlstm.compare import main, parser
from fastlstm.text.training.records import Metrics, Samples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


ABOUT = {"commands": ["python -m fastlstm.train --out x"],
         "machine": {"processor": "A CPU", "threads": 2, "precision": "fp32"},
         "text": {"parameters of the model": 1000}}  # fmt: skip


def made(folder, floor=1.5, steps=40, about=ABOUT, validated=True, **settings):
    """A run whose loss falls towards a floor, a tenth of a second a step."""
    folder.mkdir(parents=True)
    config = {"cell": "lstm", "batch_size": 4, "seq_length": 8, "unit": "byte", "lr": 1e-3,
              "data_sha256": "a", **settings}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    metrics, samples = Metrics(folder / "metrics.jsonl"), Samples(folder / "samples.jsonl")
    for step in range(1, steps + 1):
        train = floor + 2 / step
        val = floor + 0.3 if validated and step % 10 == 0 else None
        metrics.log(step, step / 40, train, val, 1.0, step / 10, 1e-3, 2.0)
        if step % 20 == 0:
            samples.append({"step": step, "text": f"{folder.name} wrote this\nat {step}"})
    metrics.close()
    samples.close()
    if about:
        (folder / "about.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def three(tmp_path):
    return [made(tmp_path / "lstm"), made(tmp_path / "gru", 1.4, cell="gru"),
            made(tmp_path / "rnn", 1.7, 60, cell="rnn", batch_size=8)]  # fmt: skip


def compared(tmp_path, runs):
    main([*map(str, runs), "--out", str(tmp_path / "page.html")])
    return tmp_path / "page.html"


def test_results_are_the_runs_own(three, tmp_path, browser, capsys):
    browser.get(compared(tmp_path, three).as_uri())
    printed = capsys.readouterr().out
    rows = [line.split("  ") for line in printed.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["gru", "lstm", "rnn"]  # the best first
    assert f"page: {(tmp_path / 'page.html').as_uri()}" in printed
    table = browser.find_element("css selector", "main table")
    cells = [[cell.text for cell in row.find_elements("css selector", "th, td")]
             for row in table.find_elements("tag name", "tr")]  # fmt: skip
    gru = dict(zip(cells[0], cells[1], strict=True))
    assert gru["run"] == "gru"
    assert gru["best validation, nats"] == "1.7000"
    assert gru["bits"] == f"{1.7 / math.log(2):.4f}"
    assert gru["at step"] == "10"
    assert float(gru["training, nats"]) == pytest.approx(
        np.mean([1.4 + 2 / step for step in range(1, 41)]), abs=6e-5
    )
    gap = 0.3 - np.mean([2 / step for step in range(31, 41)])
    assert float(gru["gap, nats"]) == pytest.approx(gap, abs=6e-5)
    assert gru["steps"] == "40"
    assert gru["time"] == "4 s"
    assert gru["characters/s"] == "320"  # 40 steps of 4 x 8
    assert gru["parameters"] == "1,000"


def test_what_differs_is_listed_and_nothing_else(three, tmp_path, browser):
    browser.get(compared(tmp_path, three).as_uri())
    heading = "//h2[text()='What differs']/following-sibling::div[1]//tr"
    rows = [row.text.split() for row in browser.find_elements("xpath", heading)]
    assert rows == [["setting", "lstm", "gru", "rnn"], ["cell", "lstm", "gru", "rnn"],
                    ["batch_size", "4", "4", "8"]]  # fmt: skip


@pytest.mark.parametrize("axis", ["steps", "time", "characters"])
@pytest.mark.parametrize("kind", ["validation", "training"])
def test_curves_lie_over_each_other(three, tmp_path, browser, axis, kind):
    from selenium.webdriver import Keys

    browser.get(compared(tmp_path, three).as_uri())
    browser.find_element("id", f"by-{axis}").click()
    browser.find_element("id", f"of-{kind}").click()
    (shown,) = (f for f in browser.find_elements("css selector", "#curves figure")
                if f.is_displayed())  # fmt: skip
    assert shown.get_attribute("id") == f"{kind}-{axis}"
    legend = [item.text for item in shown.find_elements("css selector", ".legend li")]
    assert legend == ["lstm", "gru", "rnn"]
    shown.find_element("css selector", ".scroll svg").send_keys(Keys.END)
    said = shown.find_element("class name", "here").text
    place = {"steps": "step 60", "time": "seconds 6", "characters": "million characters 0"}[axis]
    ends = (1.8, 1.7, 2.0) if kind == "validation" else (1.55, 1.45, 1.733)
    values = ", ".join(f"{name} {end:g}" for name, end in zip(legend, ends, strict=True))
    assert said == f"{place}: {values}"
    styles = [line.get_attribute("class")
              for line in shown.find_elements("css selector", ".scroll g[clip-path]")]  # fmt: skip
    dashes = [browser.execute_script("return getComputedStyle(arguments[0]).strokeDasharray", line)
              for line in shown.find_elements("css selector", ".scroll .line")]  # fmt: skip
    assert len(set(styles)) == len(set(dashes)) == 3  # colours are not all that tells them apart
    assert complaints(browser) == []


def test_samples_stand_side_by_side(three, tmp_path, browser):
    browser.get(compared(tmp_path, three).as_uri())

    def shown():
        return [s.text for s in browser.find_elements("css selector", ".sample") if s.text]

    at_40 = [f"step 40\n{name} wrote this\nat 40" for name in ("lstm", "gru", "rnn")]
    assert shown() == at_40  # the last step that all have
    browser.execute_script("which.value = 0; which.dispatchEvent(new Event('input'))")
    assert shown() == [text.replace("40", "20") for text in at_40]
    assert complaints(browser) == []


def test_the_page_is_legible_everywhere(tmp_path, browser):
    long = "a-long-name-without-an-end-" * 4
    runs = [made(tmp_path / f"{long}{j}", 1 + j / 10, lr=10.0**-j) for j in range(12)]
    page = compared(tmp_path, runs)
    legible.check(browser, page)
    looks = re.findall(r'<li class="(c\d)">.*?<g class="marks">(.*?)</g>', page.read_text(), re.S)
    assert len({(colour, re.sub(r"[\d.\s-]+", "", mark)) for colour, mark in looks}) == 12
    assert complaints(browser) == []


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"data_sha256": "b"}, "different texts"),
        ({"unit": "char"}, "different units"),
        ({"val_fraction": 0.2}, "different parts of the text"),
        ({"about": {**ABOUT, "machine": {"threads": 9}}}, "different machines"),
        ({"lr": 5.0}, None),
    ],
)
def test_what_keeps_losses_from_being_compared_is_said(tmp_path, settings, note):
    page = compared(tmp_path, [made(tmp_path / "a"), made(tmp_path / "b", **settings)]).read_text()
    notes = re.findall(r'<p class="note">(.*?)</p>', page)
    assert len(notes) == (note is not None)
    assert all(note in line for line in notes)


def test_runs_of_any_kind(tmp_path, browser, capsys):
    """Of older versions, without validation, under way, of one name in two folders, not whole."""
    runs = [made(tmp_path / "x" / "run", about=None, validated=False), made(tmp_path / "y" / "run")]
    (runs[0] / "samples.jsonl").unlink()
    with open(runs[1] / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "train_l')  # it trains right now
    shutil.copytree(runs[1], tmp_path / "z")
    (tmp_path / "z" / "samples.jsonl").write_text("")
    lines = (tmp_path / "z" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "z" / "metrics.jsonl").write_text(lines[0] + "\n")
    page = compared(tmp_path, [*runs, tmp_path / "z"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert rows[0].startswith(f"{runs[1]} ")
    assert {row.split()[0] for row in rows[:3]} == {*map(str, runs), str(tmp_path / "z")}
    before = {path: path.read_bytes() for path in runs[1].iterdir()}
    browser.get(page.as_uri())
    assert complaints(browser) == []
    assert before == {path: path.read_bytes() for path in runs[1].iterdir()}  # only looked at


def test_trained_runs_can_be_compared(tmp_path, text, capsys):
    tiny = ("--data", text, "--hidden-size", 8, "--batch-size", 4, "--seq-length", 8, "--steps", 6,
            "--eval-every", 2, "--sample-every", 3, "--device", "cpu")  # fmt: skip
    for cell in ("lstm", "rnn"):
        train(*tiny, "--cell", cell, "--out", tmp_path / cell)
    capsys.readouterr()
    page = compared(tmp_path, [tmp_path / "lstm", tmp_path / "rnn"]).read_text()
    assert page.count("wrote") == 0
    assert "--cell rnn" in page
    printed = capsys.readouterr().out
    metrics = Metrics(tmp_path / "rnn" / "metrics.jsonl", writes=False)
    metrics.look()
    assert f"{min(metrics.val):.4f}" in printed


MISTAKES = {
    "one run": (["A"], "RUN: expected 2 to 12 runs to compare, got 1"),
    "none": ([], "RUN"),
    "twice": (["A", "B", "A/../A"], "A is given more than once"),
    "nowhere": (["A", "nowhere"], "nowhere is no run: it has no config.json"),
    "a file": (["A", "FILE"], "FILE is no run"),
    "no step": (["A", "FRESH"], "FRESH has taken no step yet"),
    "damaged": (["A", "DAMAGED"], "DAMAGED/config.json is damaged: it lacks the size of a step"),
    "out": (["A", "B", "--out", "/dev/null/x"], "--out: cannot write /dev/null/x"),
    "a folder": (["A", "B", "--out", "."], "--out: cannot write .: Is a directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for run in ("A", "B", "FRESH", "DAMAGED"):
        made(tmp_path / run)
    (tmp_path / "FRESH" / "metrics.jsonl").write_text("")
    (tmp_path / "DAMAGED" / "config.json").write_text("[]")
    (tmp_path / "FILE").write_text("")
    arguments, message = MISTAKES[name]
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert message in line
    assert not (tmp_path / "compare.html").exists()


def test_the_page_goes_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([str(made(tmp_path / "a")), str(made(tmp_path / "b"))])
    assert (tmp_path / parser().get_default("out")).exists()
