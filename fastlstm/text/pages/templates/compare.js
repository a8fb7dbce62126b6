const get = id => document.getElementById(id);
const chosen = name => document.querySelector(`input[name="${name}"]:checked`).value;
function chart() {
  const shown = `${chosen("kind")}-${chosen("axis")}`;
  for (const figure of document.querySelectorAll("#curves figure")) {
    figure.hidden = figure.id !== shown;
  }
}
get("curves").addEventListener("change", chart);
chart();

const steps = JSON.parse(get("steps").textContent), which = get("which");
if (which) {
  get("pick").hidden = false;
  const show = () => {
    const step = steps[which.value];
    for (const sample of document.querySelectorAll(".sample")) {
      sample.hidden = Number(sample.dataset.step) !== step;
    }
    get("when").textContent = step.toLocaleString("en");
    which.setAttribute("aria-valuetext", get("when").textContent);
  };
  which.addEventListener("input", show);
  show();
}
