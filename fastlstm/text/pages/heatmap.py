"""The page of ``fastlstm.inspect``: a text coloured by its surprise, any cell or any gate.

Beside it what was likeliest to come next; below, all cells as small pictures, a ranking of cells
that is tested against chance, and how saturated the gates are.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..alphabet import UNITS, Alphabet
from ..probe import CHANCE, UNTRAINED, Ranking, by_chance
from .markup import render

SIZE = 230  # of a scatter plot


@dataclass
class View:
    """What the page shows of N characters, or tokens, of a text that has more.

    Attributes:
        name, text, model: of the run, of the text, and what kind of model it is.
        length, nats: of the whole text the characters or tokens, and the mean loss.
        bits_each: the same loss in bits a character, or a byte where the model reads tokens.
        pieces: the N characters or tokens.
        cells: float ``(N, L, H)`` in [-1, 1].
        gates: by name the same in [0, 1].
        bits: ``(N,)``, the surprise at each character.
        likeliest, probabilities: ``(N, 5)``, after each character, as of ``probe.Reading``.
        came: ``(N,)``, the vocabulary index that each character begins with.
        alphabet: of the model.
        ranking: as of ``probe.standing_out``, cells numbered through all layers.
        others: properties that no cell follows closely enough.
        rolls: as of ``probe.rolled``.
        fresh: as of ``probe.best_of``, of untrained models.
        closed, open: by gate, ``(L, H)``, as of ``probe.Reading``.
    """

    name: str
    text: str
    model: str
    length: int
    nats: float
    bits_each: float
    pieces: list[str]
    cells: np.ndarray
    gates: dict[str, np.ndarray]
    bits: np.ndarray
    likeliest: np.ndarray
    probabilities: np.ndarray
    came: np.ndarray
    alphabet: Alphabet
    ranking: Ranking
    others: list[str]
    rolls: dict[str, np.ndarray]
    fresh: dict[str, float]
    closed: dict[str, np.ndarray]
    open: dict[str, np.ndarray]


def cell_name(number: int, hidden_size: int) -> str:
    """As the page calls a cell, layers and cells counted from 0."""
    return f"layer {number // hidden_size}, cell {number % hidden_size}"


def heatmap(view: View) -> str:
    """The page."""
    _, layers, width = view.cells.shape
    plots, rows = [], []
    for gate in view.closed:
        for layer in range(layers):
            title = f"{gate} gate, layer {layer}"
            x, y = view.closed[gate][layer], view.open[gate][layer]
            plots.append({"title": title, "dots": list(zip(x.tolist(), y.tolist(), strict=True))})
            rows.append([title, *_shares(x, y)])
    signed = np.clip(np.rint(view.cells * 127) + 128, 1, 255)
    blocks = {"cells": signed, **{name: np.rint(255 * g) for name, g in view.gates.items()}}
    unit, length = UNITS[view.alphabet.unit], len(view.pieces)
    sizes = {"sizes": [len(piece) for piece in view.pieces]} if unit.in_bytes else {}
    kept = dict(view.ranking)
    return render(
        "heatmap.html",
        ("heatmap.css",),
        ("heatmap.js", "gallery.js"),
        view=view,
        shown="".join(view.pieces),
        unit="byte" if unit.in_bytes or unit.name == "byte" else "character",
        each=unit.each,
        per=unit.per,
        perplexity=math.exp(min(view.nats, 700)),
        state="tanh of a cell" if "forget" in view.gates else "hidden state",
        ranking=[(name, _share(view.rolls[name], best[0][1]),
                  [(j, cell_name(j, width), f"{r:+.2f}") for j, r in best])
                 for name, best in view.ranking],
        limits=[[name, f"{_limit(rolls):.2f}", f"{view.fresh[name]:.2f}",
                 f"{abs(kept[name][0][1]):.2f}" if name in kept else "none stands out"]
                for name, rolls in view.rolls.items() if name in kept or name in view.others],
        chance=CHANCE,
        untrained=UNTRAINED,
        plots=plots,
        head=HEAD,
        rows=rows,
        size=SIZE,
        constants={
            "width": width, "layers": layers, "length": length, **sizes,
            "first": view.ranking[0][1][0][0] if view.ranking else 0,
            "views": list(blocks), "several": view.likeliest.shape[1],
            "symbols": [view.alphabet.name(j) for j in range(len(view.alphabet.vocabulary))],
        },
        blocks=[(name, _encoded(block.reshape(length, -1).T, np.uint8))
                for name, block in blocks.items()],
        numbers=[("bits", _encoded(np.clip(100 * view.bits, 0, 65535), np.uint16)),
                 ("likeliest", _encoded(view.likeliest, np.uint32)),
                 ("probabilities", _encoded(65535 * view.probabilities, np.uint16)),
                 ("came", _encoded(view.came, np.uint32))],
    )  # fmt: skip


def _encoded(values: np.ndarray, kind: Any) -> str:
    """Whole numbers as base64, the least byte first."""
    numbers = np.rint(values).astype(np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


def _limit(rolls: np.ndarray) -> float:
    """What the best cell has by chance: all but one roll in fifty stay below."""
    return float(rolls[int(CHANCE * len(rolls))])


def _share(rolls: np.ndarray, r: float) -> str:
    """How often chance does as well, in words."""
    number = round(by_chance(rolls, r) * len(rolls))
    return f"{number:,} of {len(rolls):,} rolls"


HEAD = ["", "below 0.1", "above 0.9", "units never saturated", "units nearly always below 0.1",
        "units nearly always above 0.9"]  # fmt: skip


def _shares(closed: np.ndarray, opened: np.ndarray) -> list[str]:
    """A row of the table below the plots."""
    never = (closed < 0.01) & (opened < 0.01)
    parts: list[Any] = [closed, opened, never, closed > 0.9, opened > 0.9]
    return [f"{part.mean():.1%}" for part in parts]
