"""What the cells of a model do: the numbers are the model's own, and chance names no cell."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

from hypothesis import given
from hypothesis import strategies as st
from inspected import TEXT, random_model

from fastlstm.text import probe
from fastlstm.text.model import CharModel, loss_nats


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
    likely = torch.cat(logits)[:, 0].softmax(-1)
    surprise = -likely[:-1].gather(1, indices[1:]).log2()[:, 0]
    np.testing.assert_allclose(found.bits, [0, *surprise.tolist()], atol=1e-4)
    few = probe.read(model, indices, keep=11)
    best = likely[:11].topk(5)
    assert torch.equal(few.likeliest, best.indices)
    torch.testing.assert_close(few.probabilities, best.values, atol=1e-5, rtol=0)
    assert all(gate.shape == (11, 2, 5) for gate in few.gates.values())
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


RARE = {name: np.array([1.0, *[0.1] * 99]) for name in ("inside quotes", "position in the line")}


def test_a_property_stands_out_where_training_made_a_cell_follow_it():
    """Untrained models are the measure; a short text asks for more."""

    def ranking(quotes, line):
        return [("inside quotes", [(3, quotes), (1, 0.1)]), ("position in the line", [(0, line)])]

    chance = [ranking(0.3, -0.5), ranking(-0.35, 0.4)]
    for quotes, length, out in (
        (-0.8, 20_000, True), (0.4, 20_000, False), (0.52, 20_000, True), (0.52, 300, False),
        (0.8, 300, True), (0.3, 20_000, False), (1.0, 20_000, True),
    ):  # fmt: skip
        kept, others = probe.standing_out(ranking(quotes, 0.5), chance, length, RARE)
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
    cells = probe.read(model, indices).cells.numpy().reshape(len(text), -1)
    kept, names = probe.standing_out(
        ranked(model), [ranked(other) for other in others], len(text), probe.rolled(cells, text)
    )
    assert kept == []
    assert {"inside quotes", "position in the line"} <= set(names)


def test_a_cell_that_chance_explains_is_not_named():
    """However untrained models do: of the rolls of a text no more than one in fifty is as close."""
    text = Path(probe.__file__).read_text()[:3000]
    rng = np.random.default_rng(3)
    named = {False: 0, True: 0}
    for _ in range(30):
        cells = np.tanh(
            np.cumsum(rng.normal(0, 0.2, (len(text), 16)), axis=0)
        )  # slow, as cells are
        for planted in (False, True):
            if planted:
                cells[:, 3] = 0.9 * probe.properties(text)["inside quotes"]
            rank, rolls = probe.ranking(cells, text), probe.rolled(cells, text)
            kept, _ = probe.standing_out(rank, [zeros(rank)], len(text), rolls)
            named[planted] += "inside quotes" in dict(kept)
    assert named[True] == 30
    assert named[False] <= 3  # 0.6 are expected


def zeros(ranking):
    """Of models without any cell that follows something."""
    return [(name, [(0, 0.0)]) for name, _ in ranking]


def test_a_roll_is_a_rotation_of_the_text():
    """Against a loop over all of them."""
    rng = np.random.default_rng(0)
    text = "a 'quoted' word,\n  (and) more\n"
    cells = rng.normal(0, 1, (len(text), 70))  # more than go through the transform at a time
    cells[:, 1] = 0.5
    for name, rolls in probe.rolled(cells, text).items():
        kept = probe.properties(text)[name]
        direct = [abs(probe.correlations(cells, np.roll(kept, j))).max() for j in range(len(text))]
        np.testing.assert_allclose(rolls, sorted(direct, reverse=True), atol=1e-9)
        assert probe.by_chance(rolls, rolls[4]) == 5 / len(text) or rolls[0] == 0
