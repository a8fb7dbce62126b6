"""The page of ``fastlstm.inspect``: a text coloured by any cell, a ranking, and the gates."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np

from ..probe import Ranking
from . import markup

SIZE = 230  # of a scatter plot


@dataclass
class View:
    """What the page shows.

    Attributes:
        name, text: of the run and of the text.
        shown: the characters to colour.
        cells: float ``(len(shown), L, H)`` in [-1, 1].
        ranking: as of ``probe.standing_out``, cells numbered through all layers.
        others: properties that no cell follows more closely than an untrained model's.
        closed, open: by gate, ``(L, H)``, as of ``probe.Reading``.
        summary: a sentence on what was read.
    """

    name: str
    text: str
    shown: str
    cells: np.ndarray
    ranking: Ranking
    others: list[str]
    closed: dict[str, np.ndarray]
    open: dict[str, np.ndarray]
    summary: str


def cell_name(number: int, hidden_size: int) -> str:
    """As the page calls a cell, layers and cells counted from 0."""
    return f"layer {number // hidden_size}, cell {number % hidden_size}"


def heatmap(view: View) -> str:
    """The page."""
    _, layers, width = view.cells.shape
    values = np.clip(np.rint(view.cells * 127) + 128, 1, 255).astype(np.uint8)
    raw = base64.b64encode(values.reshape(len(view.shown), -1).T.tobytes()).decode()
    first = view.ranking[0][1][0][0] if view.ranking else 0
    constants = {"width": width, "layers": layers, "first": first, "length": len(view.shown)}
    body = (
        f"<h1>Cells of {markup.text(view.name)}</h1>\n<p>{markup.text(view.summary)}</p>\n"
        "<noscript><p>Colouring the text needs a browser that runs scripts.</p></noscript>\n"
        "<main>\n<h2>One cell over the text</h2>\n"
        f'<p id="choice"><label>layer <input id="layer" type="number" min="0" '
        f'max="{layers - 1}"></label> <label>cell <input id="cell" type="number" min="0" '
        f'max="{width - 1}"></label> <button id="before">previous</button> '
        '<button id="after">next</button> <output id="about"></output></p>\n'
        '<p class="muted"><span class="scale">-1 <i id="minus"></i> 0 <i id="plus"></i> +1</span> '
        '<output id="value">point at a character for its value</output></p>\n'
        f'<pre id="text" tabindex="0" aria-label="the text, coloured by the cell">'
        f"{markup.text(view.shown)}</pre>\n{_ranking(view, width)}{_gates(view)}</main>\n"
        f"{markup.data('constants', constants)}"
        f'<script type="application/octet-stream" id="values">{raw}</script>\n'
    )
    return markup.page(f"Cells of {view.name} on {view.text}", body, SCRIPT, STYLE)


def _ranking(view: View, width: int) -> str:
    blocks, rest = "", ""
    if view.others:
        rest = (
            '<p class="muted">No cell follows these more closely than the cells of an untrained '
            f"model: {', '.join(view.others)}.</p>\n"
        )
    if not view.ranking:
        return f"<h2>No cell stands out</h2>\n{rest}" if rest else ""
    for name, best in view.ranking:
        rows = "".join(
            f'<li><button data-cell="{j}" data-what="{name}, r = {r:+.2f}">'
            f"{cell_name(j, width)}</button> <span>r = {r:+.2f}</span></li>"
            for j, r in best
        )
        blocks += f"<section><h3>{name}</h3><ol>{rows}</ol></section>\n"
    return (
        '<h2>The most interpretable cells</h2>\n<p class="muted">By a cell\'s correlation r with '
        "a property of the text, where an untrained model has none as close; choose one to see it "
        f'above.</p>\n<div class="ranking">\n{blocks}</div>\n{rest}'
    )


def _gates(view: View) -> str:
    if not view.closed:
        return ""
    rows, drawings = [], ""
    for gate in view.closed:
        for layer in range(view.cells.shape[1]):
            x, y = view.closed[gate][layer], view.open[gate][layer]
            rows.append([f"{gate} gate, layer {layer}", f"{x.mean():.1%}", f"{y.mean():.1%}",
                         f"{((x < 0.01) & (y < 0.01)).mean():.1%}",
                         f"{(x > 0.9).mean():.1%}", f"{(y > 0.9).mean():.1%}"])  # fmt: skip
            drawings += _scatter(f"{gate} gate, layer {layer}", x, y)
    head = ["", "below 0.1", "above 0.9", "units never saturated", "units nearly always below 0.1",
            "units nearly always above 0.9"]  # fmt: skip
    return (
        '<h2>Saturation of the gates</h2>\n<p class="muted">A dot is a unit: to the right, the '
        "part of the time that its gate is nearly closed (below 0.1); upwards, nearly open (above "
        "0.9). A forget gate in the upper left corner remembers; an input gate in the lower right "
        f'one ignores.</p>\n<div class="plots">{drawings}</div>\n{markup.table(head, rows)}'
    )


def _scatter(title: str, x: np.ndarray, y: np.ndarray) -> str:
    low, high = 34, SIZE - 12

    def at(v: float) -> float:
        return low + v * (high - low)

    parts = [f'<polygon class="frame" points="{low},{12} {high},{SIZE - low} {low},{SIZE - low}"/>']
    for tick in (0, 0.5, 1):
        parts.append(
            f'<text x="{at(tick):.0f}" y="{SIZE - low + 16}" text-anchor="middle">{tick}</text>'
            f'<text x="{low - 5}" y="{SIZE - at(tick) + 4:.0f}" text-anchor="end">{tick}</text>'
        )
    parts += [
        f'<circle class="dot" cx="{at(a):.1f}" cy="{SIZE - at(b):.1f}" r="2.2"/>'
        for a, b in zip(x, y, strict=True)
    ]
    return (
        f'<figure><svg viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{title}: closed and open '
        f'parts of the time">{"".join(parts)}</svg><figcaption>{title}</figcaption></figure>\n'
    )


STYLE = """
#text { max-height: 34rem; overflow: auto; font-size: .95rem; line-height: 1.55; }
#text span.end::before { content: "\\21b5"; font-size: .8em; }
#choice { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
#choice input { width: 5rem; } #choice output { font-weight: 600; }
.scale i { display: inline-block; width: 6rem; height: .8rem; border-radius: .2rem; }
#minus { background: linear-gradient(to left, transparent, rgb(var(--minus))); }
#plus { background: linear-gradient(to right, transparent, rgb(var(--plus))); }
#value { float: right; }
.ranking, .plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
  gap: .8rem; }
.ranking h3 { font-size: .95rem; margin: .3rem 0; } .ranking ol { margin: 0; padding-left: 1.4rem; }
.ranking button { padding: 0; border: 0; background: none; color: var(--one); cursor: pointer;
  text-decoration: underline; }
.ranking span { color: var(--muted); font-variant-numeric: tabular-nums; }
.plots figure { text-align: center; } .frame { fill: none; stroke: var(--line); }
.dot { fill: var(--one); opacity: .45; }
"""

SCRIPT = """
"use strict";
const get = id => document.getElementById(id);
const known = JSON.parse(get("constants").textContent);
const values = Uint8Array.from(atob(get("values").textContent), c => c.charCodeAt(0));
const marks = [...get("text").textContent].map(c => {
  const mark = document.createElement("span");
  mark.textContent = c;
  if (c === "\\n") mark.className = "end";
  return mark;
});
get("text").replaceChildren(...marks);
const value = (cell, j) => (values[cell * known.length + j] - 128) / 127;

let chosen = known.first;
function choose(cell, what) {
  const cells = known.layers * known.width;
  chosen = (cell + cells) % cells;
  get("layer").value = Math.floor(chosen / known.width);
  get("cell").value = chosen % known.width;
  const labels = [...document.querySelectorAll("[data-cell]")]
    .filter(button => Number(button.dataset.cell) === chosen)
    .map(button => button.dataset.what);
  get("about").textContent = labels.join("; ");
  marks.forEach((mark, j) => {
    const v = value(chosen, j);
    mark.style.backgroundColor =
      `rgba(var(${v < 0 ? "--minus" : "--plus"}), ${(0.85 * Math.abs(v)).toFixed(2)})`;
  });
}
const asked = () => {
  const limit = (id, most) => Math.min(most, Math.max(0, Math.floor(Number(get(id).value))));
  choose(limit("layer", known.layers - 1) * known.width + limit("cell", known.width - 1));
};
get("layer").addEventListener("change", asked);
get("cell").addEventListener("change", asked);
get("before").addEventListener("click", () => choose(chosen - 1));
get("after").addEventListener("click", () => choose(chosen + 1));
document.querySelectorAll("[data-cell]").forEach(button =>
  button.addEventListener("click", () => {
    choose(Number(button.dataset.cell));
    get("choice").scrollIntoView({ block: "start" });
  }));
get("text").addEventListener("pointerover", event => {
  const j = marks.indexOf(event.target);
  if (j >= 0) {
    get("value").textContent =
      `${JSON.stringify(event.target.textContent)} at ${j}: ${value(chosen, j).toFixed(2)}`;
  }
});
choose(known.first);
"""
