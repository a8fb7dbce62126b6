"""The page of a run: what it says, and that it lives in a real browser, opened from a file."""

import json
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")

import legible
from chromium import chromium, complaints
from hypothesis import given
from hypothesis import strategies as st

import fastlstm.train
from fastlstm.text.pages import charts, markup, report
from fastlstm.text.training import schedule
from fastlstm.text.training.records import Metrics, Samples

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = (
    '</pre></script><script>document.title = "run"</script><img src=x onerror=alert(1)>\0&amp;'
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


ABOUT = {
    "commands": ["python -m fastlstm.train --data 'my text' --out x"],
    "machine": {"processor": "A CPU", "threads": 3, "torch": "2.13.0"},
    "text": {"bytes": 1234567, "the most frequent": "space 15.3%", "read": "read 1 file"},
}


def state(**values):
    return report.Snapshot(
        **{
            "name": "a run", "status": "finished", "step": 40, "total": 40, "epoch": 1.5,
            "seconds": 3700.0, "rate": 12345.6, "best": 1.5,
            "settings": {"lr": 1e-3, "data": ["x"], "clip_norm": 5.0}, "about": ABOUT,
            "commands": [("More:", "python -m fastlstm.sample x")], **values,
        }
    )  # fmt: skip


def written(tmp_path, samples=(), **values):
    """A page on the disk of a run whose loss fell from 4 to 2 in forty steps."""
    metrics = Metrics(Path("unwritten"), writes=False)
    for step in range(1, 41):
        val = 2.5 if step % 10 == 0 else None
        metrics.log(step, step / 40, 4 - step / 20, val, 1.0, float(step), 1 / step, 3.0 + step)
    found = [{"step": 10 * (j + 1), "text": text} for j, text in enumerate(samples)]
    path = tmp_path / "report.html"
    path.write_text(report.report(state(**values), metrics, found), encoding="utf-8")
    return path


def texts(browser, selector):
    return [e.text for e in browser.find_elements("css selector", selector)]


def test_a_page_shows_the_run(tmp_path, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    page = written(tmp_path, ["first words", "second words"])
    assert "http" not in page.read_text().replace("http-equiv", "")
    browser.get(page.as_uri())
    assert browser.title == "a run: finished"
    shown = browser.find_element("tag name", "body").text
    for words in ("40 of 40", "1 h 1 min", "12,346", "1.500 nats", "2.164 bits", "0.001"):
        assert words in shown
    assert texts(browser, "#samples pre") == ["second words", ""]  # one at a time
    browser.execute_script("which.value = 0; which.dispatchEvent(new Event('input'))")
    assert texts(browser, "#samples pre") == ["", "first words"]
    assert browser.find_element("id", "when").text == "step 10"
    assert browser.find_element("css selector", "#linear svg").is_displayed()
    browser.find_element("id", "to-log").click()
    assert not browser.find_element("css selector", "#linear svg").is_displayed()
    assert browser.find_element("css selector", "#log svg").is_displayed()

    def reloaded():
        browser.refresh()
        return browser.find_element("id", "when").text == "step 10"

    # What the reader chose stays chosen. A busy browser may load the page before it has kept that.
    WebDriverWait(browser, 20).until(lambda _: reloaded())
    assert browser.find_element("css selector", "#log svg").is_displayed()
    loaded = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0
    assert complaints(browser) == []


def test_the_curve_can_be_read_with_the_pointer(tmp_path, browser):
    from selenium.webdriver import ActionChains

    browser.get(written(tmp_path).as_uri())
    browser.execute_script("sessionStorage.clear()")
    browser.refresh()
    chart = browser.find_element("css selector", "#linear .scroll svg")
    ActionChains(browser).move_to_element_with_offset(chart, 0, 0).perform()
    assert 19 <= step_said(browser) <= 22  # the middle


def test_the_curve_can_be_read_with_the_keyboard(tmp_path, browser):
    from selenium.webdriver import Keys

    browser.get(written(tmp_path).as_uri())
    browser.execute_script("sessionStorage.clear()")
    browser.refresh()
    chart = browser.find_element("css selector", "#linear .scroll svg")
    for key, step in ((Keys.LEFT, 39), (Keys.HOME, 1), (Keys.RIGHT, 2), (Keys.END, 40)):
        chart.send_keys(key)
        if step > 9:
            assert step_said(browser) == step
        else:
            said = browser.find_element("css selector", "#linear .here").text
            assert said == f"step {step}: training {4 - step / 20:g}"


def step_said(browser):
    """The step whose losses the chart tells; they must be the run's."""
    said = browser.find_element("css selector", "#linear .here").text
    step = int(said.split()[1].rstrip(":"))
    assert said == f"step {step}: training {4 - step / 20:g}, validation 2.5"
    return step


def test_the_page_is_legible_everywhere(tmp_path, browser):
    for status in ("finished", "training"):
        page = written(tmp_path, ["some words\n" * 30, "x" * 300, HOSTILE], status=status)
        legible.check(browser, page)
    assert complaints(browser) == []


def test_the_page_says_what_made_the_run(tmp_path, browser):
    browser.get(written(tmp_path).as_uri())
    shown = browser.find_element("tag name", "body").text
    for words in ("A CPU", "threads 3", "1,234,567", "space 15.3%", "read 1 file"):
        assert words in shown
    browser.get(written(tmp_path, about={}).as_uri())  # a run of an older version
    assert "How it was made" not in browser.find_element("tag name", "body").text
    assert complaints(browser) == []


@pytest.mark.parametrize("allowed", [True, False])
def test_a_command_can_be_copied(tmp_path, browser, allowed):
    """Also where the browser does not let a page write to the clipboard."""
    command = ABOUT["commands"][0]
    browser.get(written(tmp_path).as_uri())
    answer = "Promise.resolve(copied = text)" if allowed else "Promise.reject(Error())"
    browser.execute_script(
        "window.copied = null; Object.defineProperty(navigator, 'clipboard', "
        f"{{ value: {{ writeText: text => {answer} }} }}); "
        "document.addEventListener('copy', () => { copied = String(getSelection()); })"
    )
    (place,) = (c for c in browser.find_elements("class name", "command") if command in c.text)
    button = place.find_element("tag name", "button")
    assert button.text == "Copy"
    button.click()
    wait(lambda: button.text == "Copied")
    assert browser.execute_script("return copied") == command


def test_small_charts_show_the_gap_the_rate_and_the_gradient(tmp_path, browser):
    from selenium.webdriver import Keys

    browser.get(written(tmp_path).as_uri())
    # 2.5 beside a mean of the ten training losses before.
    for name, key, said in (
        ("gap", Keys.END, "step 40: validation minus training 0.275"),
        ("gap", Keys.HOME, "step 10: validation minus training -1.225"),
        ("rate", Keys.END, "step 40: learning rate 0.025"),
        ("norm", Keys.HOME, "step 1: norm 4, limit 5"),
    ):
        figure = browser.find_element("id", name)
        figure.find_element("css selector", ".scroll svg").send_keys(key)
        assert figure.find_element("class name", "here").text == said
    assert (
        "+0.275\nnats, validation minus training"
        in browser.find_element("class name", "cards").text
    )


def test_charts_of_what_older_logs_lack_are_left_out():
    metrics = Metrics(Path("unwritten"), writes=False)
    metrics.remember({"step": 1, "train_loss": 2.0, "val_loss": None})
    page = report.report(state(), metrics, [])
    assert 'id="linear"' in page
    assert not any(f'id="{name}"' in page for name in ("gap", "rate", "norm"))


def test_text_cannot_become_markup(tmp_path, browser):
    page = written(tmp_path, [HOSTILE], name=HOSTILE, settings={"data": [HOSTILE]},
                   commands=[("x", HOSTILE)])  # fmt: skip
    browser.get(page.as_uri())
    shown = HOSTILE.replace("\0", "␀")
    assert browser.title == shown + ": finished"
    assert texts(browser, "h1") == [shown]
    assert texts(browser, "#samples pre") == [shown]
    assert len(browser.find_elements("tag name", "img")) == 0
    assert complaints(browser) == []


def test_a_script_that_slipped_in_would_not_run(tmp_path, browser):
    page = written(tmp_path)
    evil = "<script>document.title = 'run'</script></main>"
    page.write_text(page.read_text().replace("</main>", evil))
    browser.get(page.as_uri())
    assert browser.title == "a run: finished"
    assert any("Content Security Policy" in line for line in complaints(browser))


def test_a_live_page_follows_the_run_and_ends_with_it(tmp_path, browser, monkeypatch):
    """Opened from the disk while it trains, and never touched."""
    monkeypatch.setattr(report, "EVERY", 1)
    monkeypatch.setattr(fastlstm.train, "REPORT_SECONDS", 0.3)
    text = tmp_path / "text"
    text.write_text("</script><script>document.title = 1</script>\n" * 90)
    run = tmp_path / "run"
    finish = threading.Event()
    real = schedule.learning_rate

    def rate(config, step, total, epoch):  # the run ends when the test has seen it live
        finish.wait(0.03)
        return real(config, step, total, epoch)

    monkeypatch.setattr(schedule, "learning_rate", rate)
    arguments = ["--data", text, "--out", run, "--hidden-size", 8, "--batch-size", 4,
                 "--seq-length", 8, "--steps", 300, "--sample-every", 30, "--device", "cpu",
                 "--eval-every", 50]  # fmt: skip
    training = threading.Thread(target=fastlstm.train.main, args=([str(a) for a in arguments],))
    training.start()
    try:
        wait(lambda: (run / "report.html").exists())
        browser.get((run / "report.html").as_uri())
        assert browser.find_element("id", "status").get_attribute("data-live") == "1"
        seen = []
        for _ in range(3):
            wait(lambda: steps_done(browser) not in [None, *seen])
            seen.append(steps_done(browser))
    finally:
        finish.set()
        training.join()
    assert seen == sorted(seen)
    wait(lambda: browser.title == "run: finished")
    assert steps_done(browser) == 300
    assert len(browser.find_elements("css selector", "#samples li")) == 10
    assert browser.find_element("id", "status").text == "finished"
    assert complaints(browser) == []


def steps_done(browser):
    """The page's progress, or None in the middle of a reload."""
    script = "const p = document.querySelector('progress'); return p && p.value"
    return browser.execute_script(script)


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_page_that_nobody_writes_any_more_says_so(tmp_path, browser):
    page = written(tmp_path, status="training", step=20)
    text = page.read_text()
    now = text.split('data-written="')[1].split('"')[0]
    page.write_text(text.replace(f'data-written="{now}"', f'data-written="{int(now) - 600}"'))
    browser.get(page.as_uri())
    said = browser.find_element("id", "status").text
    assert "no news for 10 min" in said
    assert "about 1 h 1 min to go" in said


@given(
    y=st.lists(st.floats(0, 9), min_size=1, max_size=1500),
    logarithmic=st.booleans(),
    begin=st.integers(1, 10**6),
)
def test_a_thinned_curve_keeps_means_and_extremes(y, logarithmic, begin):
    x = np.arange(begin, begin + len(y))
    found = charts.thin(x, np.array(y), logarithmic)
    assert 1 <= len(found) <= charts.POINTS
    assert (np.diff(found[:, 0]) > 0).all()
    assert found[:, 2].min() == min(y)
    assert found[:, 3].max() == max(y)
    assert (found[:, 2] <= found[:, 1] + 1e-9).all()
    assert (found[:, 1] <= found[:, 3] + 1e-9).all()
    if len(y) <= charts.POINTS and not logarithmic:
        assert found[:, 1].tolist() == y


def test_a_long_run_gives_a_small_page():
    metrics = Metrics(Path("unwritten"), writes=False)
    metrics.steps.extend(range(1, 200_001))
    metrics.train.extend(math.exp(-j / 1e5) for j in range(200_000))
    metrics.rates.extend(1e-3 for _ in range(200_000))
    metrics.norms.extend(1 + j % 7 for j in range(200_000))
    samples = [{"step": j, "text": "x" * 400} for j in range(1, 400)]
    page = report.report(state(total=200_000, step=200_000), metrics, samples)
    assert len(page) < 200_000
    assert page.count("<li>") == report.SAMPLES
    assert "step 1<" in page
    assert "step 399<" in page


def test_a_page_before_the_first_step():
    metrics = Metrics(Path("unwritten"), writes=False)
    page = report.report(state(status="training", step=0, best=None), metrics, [])
    assert "The first step is under way" in page
    assert 'http-equiv="refresh"' in page  # for a browser without scripts


def test_samples_are_kept_up_to_the_checkpoint(tmp_path):
    samples = Samples(tmp_path / "samples.jsonl")
    for step in (5, 10, 15):
        samples.append({"step": step, "text": f"at {step}\n"})
    samples.close()
    again = Samples(tmp_path / "samples.jsonl")
    again.keep_until(10)
    again.append({"step": 12, "text": "new"})
    assert [s["step"] for s in again.entries] == [5, 10, 12]
    again.close()
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 3


@given(st.text())
def test_text_of_a_page_is_no_markup(text):
    """Neither among the markup nor among the values for scripts."""
    page = written_text(text)
    found = page.split('id="x">')[1].split("</pre>")[0]
    assert not set("<>\"'\0") & set(found)
    island = page.split('id="values">')[1].split("</script>")[0]
    assert "<" not in island
    assert json.loads(island) == text


def written_text(text):
    source = ('{% from "parts.html" import data %}<pre id="x">{{ text }}</pre>'
              '{{ data("values", text) }}')  # fmt: skip
    return markup._environment().from_string(source).render(text=text)
