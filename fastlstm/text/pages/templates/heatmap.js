"use strict";
const get = id => document.getElementById(id);
const known = JSON.parse(get("constants").textContent);
const decoded = id => Uint8Array.from(atob(get(id).textContent), c => c.charCodeAt(0));
const values = {};  // of each kind of picture, cell after cell
for (const name of known.views) values[name] = decoded("values-" + name);
const bits = new Uint16Array(decoded("bits").buffer);
const likeliest = new Uint32Array(decoded("likeliest").buffer);
const probabilities = new Uint16Array(decoded("probabilities").buffer);
const came = new Uint32Array(decoded("came").buffer);
const MOST_BITS = 8, STRONGEST = 0.85;

// A character each, or a token of as many characters as `sizes` says.
const letters = [...get("text").textContent];
let begin = 0;
const marks = (known.sizes ?? letters.map(() => 1)).map(size => {
  const mark = document.createElement("span");
  mark.textContent = letters.slice(begin, begin += size).join("");
  if (mark.textContent.endsWith("\n")) mark.className = "end";
  return mark;
});
get("text").replaceChildren(...marks);
const places = new Map(marks.map((mark, j) => [mark, j]));

// A cell lies in [-1, 1], a gate in [0, 1].
const value = (view, cell, j) => {
  const v = values[view][cell * known.length + j];
  return view === "cells" ? (v - 128) / 127 : v / 255;
};
const surprise = j => bits[j] / 100;

let view = "surprise", chosen = known.first, at = -1;
const name = cell => `layer ${Math.floor(cell / known.width)}, cell ${cell % known.width}`;
const SCALES = {
  surprise: `0 <i class="much"></i> ${MOST_BITS} bits and more`,
  cells: '-1 <i class="minus"></i> 0 <i class="plus"></i> +1',
  gate: 'closed, 0 <i class="plus"></i> 1, open',
};
function colour() {
  get("view").value = view;
  get("unit").hidden = view === "surprise";
  get("scale").innerHTML = SCALES[view] ?? SCALES.gate;
  get("layer").value = Math.floor(chosen / known.width);
  get("cell").value = chosen % known.width;
  const labels = [...document.querySelectorAll("[data-what]")]
    .filter(button => Number(button.dataset.cell) === chosen)
    .map(button => button.dataset.what);
  get("about").textContent = view === "cells" ? labels.join("; ") : "";
  marks.forEach((mark, j) => {
    const v = view === "surprise" ? Math.min(1, surprise(j) / MOST_BITS) : value(view, chosen, j);
    const ink = view === "surprise" ? "--surprise" : v < 0 ? "--minus" : "--plus";
    mark.style.backgroundColor = `rgba(var(${ink}), ${(STRONGEST * Math.abs(v)).toFixed(2)})`;
  });
  for (const button of get("gallery").children) {
    const shown = view !== "surprise" && Number(button.dataset.cell) === chosen;
    button.setAttribute("aria-pressed", shown);
  }
  tell();
}
function choose(cell, as) {
  const cells = known.layers * known.width;
  chosen = (cell + cells) % cells;
  view = as;
  colour();
}
function show(cell, as) {  // chosen further down the page
  choose(cell, as);
  get("choice").scrollIntoView({ block: "start" });
}

// What the model thought of a character, and of the one after it.
function guesses(list, j, actual) {
  const rows = [];
  for (let k = 0; j >= 0 && k < known.several; k++) {
    const p = probabilities[j * known.several + k] / 65535;
    const symbol = likeliest[j * known.several + k], row = document.createElement("li");
    const label = document.createElement("span"), bar = document.createElement("i");
    const share = document.createElement("span");
    label.textContent = known.symbols[symbol];
    bar.style.width = `${100 * p}%`;
    share.textContent = `${(100 * p).toFixed(p < 0.1 ? 1 : 0)}%`;
    if (symbol === actual) row.className = "came";
    row.append(label, bar, share);
    rows.push(row);
  }
  if (!rows.length) rows.push(Object.assign(document.createElement("li"),
    { textContent: "nothing" }));
  list.replaceChildren(...rows);
}
const visible = text => text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
function tell() {
  if (at < 0) return;
  const c = marks[at].textContent, part = (a, b) =>
    visible(marks.slice(Math.max(0, a), b).map(m => m.textContent).join(""));
  const here = document.createElement("b");
  here.textContent = c === " " ? "\u2423" : visible(c);
  get("where").replaceChildren(part(at - 12, at), here, part(at + 1, at + 7));
  const parts = [`${JSON.stringify(c)} at ${at.toLocaleString("en")}`];
  parts.push(at ? `${surprise(at).toFixed(2)} bits of surprise` : "nothing came before");
  if (view !== "surprise") {
    const what = view === "cells" ? name(chosen) : `${view} gate of ${name(chosen)}`;
    parts.push(`${what}: ${value(view, chosen, at).toFixed(2)}`);
  }
  get("value").textContent = parts.join("; ");
  guesses(get("expected"), at - 1, came[at]);
  guesses(get("next"), at, at + 1 < came.length ? came[at + 1] : -1);
}
function move(j) {
  if (at >= 0) marks[at].classList.remove("at");
  at = Math.min(marks.length - 1, Math.max(0, j));
  marks[at].classList.add("at");
  tell();
}
// The character a line up or down, as far to the right.
function vertical(direction) {
  const from = marks[Math.max(at, 0)].getBoundingClientRect();
  let best = at, least = Infinity;
  for (let j = Math.max(at, 0) + direction; j >= 0 && j < marks.length; j += direction) {
    const box = marks[j].getBoundingClientRect();
    const lines = direction * (box.top - from.top);
    if (lines < from.height / 2) continue;
    if (lines > 2.5 * from.height && best !== at) break;
    const distance = lines * 50 + Math.abs(box.left - from.left);
    if (distance < least) [best, least] = [j, distance];
    if (lines > 6 * from.height) break;
  }
  return best;
}
get("text").addEventListener("keydown", event => {
  const steps = {
    ArrowLeft: () => at - 1, ArrowRight: () => at + 1, ArrowUp: () => vertical(-1),
    ArrowDown: () => vertical(1), Home: () => 0, End: () => marks.length - 1,
  };
  if (!(event.key in steps)) return;
  event.preventDefault();
  move(steps[event.key]());
  marks[at].scrollIntoView({ block: "nearest", inline: "nearest" });
});
for (const kind of ["pointerover", "pointerdown"]) {
  get("text").addEventListener(kind, event => {
    if (places.has(event.target)) move(places.get(event.target));
  });
}

const asked = () => {
  const limit = (id, most) => Math.min(most, Math.max(0, Math.floor(Number(get(id).value))));
  choose(limit("layer", known.layers - 1) * known.width + limit("cell", known.width - 1), view);
};
get("layer").addEventListener("change", asked);
get("cell").addEventListener("change", asked);
get("view").addEventListener("change", () => choose(chosen, get("view").value));
get("before").addEventListener("click", () => choose(chosen - 1, view));
get("after").addEventListener("click", () => choose(chosen + 1, view));
document.querySelectorAll("[data-what]").forEach(button =>
  button.addEventListener("click", () => show(Number(button.dataset.cell), "cells")));
