"""What the trainer says as it goes: to a log, and when a loss shows that it no longer learns."""

import json
import math
import re

import pytest

pytest.importorskip("safetensors")


from fastlstm.text.opening import load_model
from fastlstm.text.training import divergence, heartbeat
from fastlstm.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


def train(run, text, *arguments):
    main(["--data", str(text), "--out", str(run), "--hidden-size", "16", "--batch-size", "4",
          "--seq-length", "8", "--sample-every", "0", "--device", "cpu",
          *map(str, arguments)])  # fmt: skip
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_log_gets_a_line_every_so_often_before_the_first_evaluation(
    tmp_path, text, capsys, monkeypatch
):
    """pytest's captured output is no terminal."""
    monkeypatch.setattr(heartbeat, "SECONDS", 0.0)
    metrics = train(tmp_path / "a", text, "--steps", 6, "--eval-every", 4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    short = r"step {}: loss {:.3f}, [\d,]+ chars/s"
    for number, line in enumerate(lines, 1):
        evaluated = number in (4, 6)  # which has a line of its own
        loss = metrics[number - 1]["train_loss"]
        assert bool(re.fullmatch(short.format(number, loss), line)) != evaluated
    assert len(lines) == 6
    assert heartbeat.Heartbeat(wanted=True).due()
    assert not heartbeat.Heartbeat(wanted=False).due()  # a terminal shows the bar
    monkeypatch.setattr(heartbeat, "SECONDS", 3600.0)
    train(tmp_path / "b", text, "--steps", 6, "--eval-every", 4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2


def test_ten_seconds_lie_between_two_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    line = heartbeat.Heartbeat(wanted=True)
    for second, due in ((9.9, False), (10.0, True)):
        now[0] = second
        assert line.due() == due
    line.printed()
    assert not line.due()


def test_the_greeting_says_what_was_read(tmp_path, text, capsys):
    train(tmp_path / "run", text, "--steps", 1)
    assert f"\nread 1 file, {text.stat().st_size:,} bytes\n" in capsys.readouterr().out


def test_a_folder_that_holds_the_run_itself_can_be_resumed(tmp_path, text, capsys):
    """What the run wrote is no part of the text that it is trained on."""
    run = tmp_path / "runs" / "x"
    train(run, tmp_path, "--steps", 3)
    first = capsys.readouterr().out
    main(["--out", str(run), "--resume", "--steps", "5", "--data", str(tmp_path)])
    for printed in (first, capsys.readouterr().out):
        assert "read 1 file," in printed
        assert "; left out 1 run folder (" in printed
    assert load_model(run, "latest")[2]["step"] == 5


@pytest.mark.parametrize(
    ("rate", "steps", "more"),
    [("1e30", 20, []), ("1e4", 20, []), ("1e30", 20, ["--val-fraction", 0]),
     ("1e30", 1, []), ("1e30", 1, ["--val-fraction", 0, "--test-fraction", 0.05])],
)  # fmt: skip
def test_a_loss_far_above_a_guess_stops_the_run(tmp_path, text, capsys, rate, steps, more):
    """Whichever loss is the first to show it: of training, of validation, of the test."""
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        train(run, text, "--steps", steps, "--lr", rate, "--eval-every", 1, *more)
    assert error.value.code == 1
    out, message = capsys.readouterr()
    assert message.count("\n") == 1
    _, vocabulary, meta = load_model(run, "latest")
    guess = math.log(len(vocabulary))
    assert f"is far above the {guess:.2f} nats of a blind guess: stopped" in message
    assert "--lr" in message
    assert not re.search(r"\d{12}", message + out)
    assert meta["best"] is None or meta["best"] < guess + divergence.MARGIN


def test_losses_that_a_run_comes_back_from_do_not_stop_it():
    guess = math.log(50)
    for nats in (0.0, guess, guess + 15, guess + divergence.MARGIN):
        divergence.check("the loss", nats, 50)
    for nats in (guess + divergence.MARGIN + 0.01, 1e30, math.inf, math.nan):
        with pytest.raises(divergence.DivergedError):
            divergence.check("the loss", nats, 50)
    divergence.check("the loss", 0.0, 1)  # of a text of one character
    with pytest.raises(divergence.DivergedError, match="no number"):
        divergence.check("the loss", 1.0, 50, finite=False)


def test_the_loss_curve_is_titled_after_text_and_model(tmp_path, text, monkeypatch):
    from matplotlib.axes import Axes

    titles, real = [], Axes.set
    monkeypatch.setattr(
        Axes, "set", lambda axes, **words: titles.append(words["title"]) or real(axes, **words)
    )
    train(tmp_path / "some-folder", text, "--steps", 2, "--cell", "gru")
    assert set(titles) == {"text: 2x16 gru"}
