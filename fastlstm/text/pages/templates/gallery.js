// All cells as small pictures, painted when they come into sight.
const COLUMNS = 48, MOST_ROWS = 36;
const spots = [];  // where a character is in a picture, -1 beyond its end
let row = 0;
for (let j = 0, column = 0; j < marks.length; j++) {
  spots.push(row < MOST_ROWS ? row * COLUMNS + column : -1);
  column += 1;
  const ended = marks[j].textContent.endsWith("\n");
  if (ended && column === 1) column = 0;  // an empty line needs no row
  if (column && (ended || column === COLUMNS)) { row += 1; column = 0; }
}
const ROWS = Math.min(MOST_ROWS, row + 1);
const inks = () => {
  const style = getComputedStyle(document.documentElement);
  const ink = id => style.getPropertyValue(id).split(",").map(Number);
  return { plus: ink("--plus"), minus: ink("--minus") };
};
let ink = inks();
function paint(canvas, as, cell) {
  const context = canvas.getContext("2d"), image = context.createImageData(COLUMNS, ROWS);
  spots.forEach((spot, j) => {
    if (spot < 0) return;
    const v = value(as, cell, j);
    image.data.set([...(v < 0 ? ink.minus : ink.plus), 40 + 215 * Math.abs(v)], 4 * spot);
  });
  context.putImageData(image, 0, 0);
}
const variation = (as, cell) => {
  let sum = 0, squares = 0;
  for (let j = 0; j < known.length; j++) {
    const v = value(as, cell, j);
    sum += v;
    squares += v * v;
  }
  return squares / known.length - (sum / known.length) ** 2;
};
const sight = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    sight.unobserve(target);
    paint(target.querySelector("canvas"), get("pictures").value, Number(target.dataset.cell));
  }
}, { rootMargin: "200px" });
function hang() {
  const as = get("pictures").value, cells = [...Array(known.layers * known.width).keys()];
  if (get("order").value === "variation") {
    const amounts = cells.map(cell => variation(as, cell));
    cells.sort((a, b) => amounts[b] - amounts[a]);
  }
  sight.disconnect();
  get("gallery").replaceChildren(...cells.map(cell => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [COLUMNS, ROWS];
    button.dataset.cell = cell;
    button.setAttribute("aria-pressed", view === as && cell === chosen);
    button.append(canvas, name(cell));
    button.addEventListener("click", () => show(cell, as));
    sight.observe(button);
    return button;
  }));
}
get("pictures").addEventListener("change", hang);
get("order").addEventListener("change", hang);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  ink = inks();
  hang();
});
hang();
colour();
