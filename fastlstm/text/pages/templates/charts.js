"use strict";
// Reading a chart's values with the pointer, a finger or the arrow keys.
document.querySelectorAll("figure.chart").forEach(figure => {
  const places = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector(".scroll svg"), pointer = svg.querySelector(".pointer");
  const here = figure.querySelector(".here");
  let at = places.px.length - 1;
  function show(j) {
    at = Math.min(places.px.length - 1, Math.max(0, j));
    pointer.setAttribute("x1", places.px[at]);
    pointer.setAttribute("x2", places.px[at]);
    pointer.setAttribute("visibility", "visible");
    const values = places.lines.filter(([, ys]) => ys[at] !== null)
      .map(([label, ys]) => `${label} ${ys[at]}`).join(", ");
    here.textContent = `${places.name} ${places.at[at].toLocaleString("en")}: ${values}`;
  }
  function hide() {
    pointer.setAttribute("visibility", "hidden");
    here.textContent = "\u00a0";
  }
  for (const name of ["pointermove", "pointerdown"]) {
    svg.addEventListener(name, event => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      show(places.px.reduce((a, p, j) =>
        Math.abs(p - x) < Math.abs(places.px[a] - x) ? j : a, 0));
    });
  }
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -places.px.length, End: places.px.length };
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(at + steps[event.key]);
  });
});
