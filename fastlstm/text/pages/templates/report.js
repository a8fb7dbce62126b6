const get = id => document.getElementById(id);
const memory = {  // what the reader chose outlives a reload, where the browser lets it
  read(name) { try { return sessionStorage.getItem(name + location.pathname); }
               catch { return null; } },
  write(name, value) { try { sessionStorage.setItem(name + location.pathname, value); }
                       catch { /* then it does not */ } },
};

const status = get("status"), text = status.textContent;
let busy = 0;  // when the reader last did something that a reload would break
for (const name of ["pointermove", "keydown"]) {
  document.addEventListener(name, event => {
    if (event.target.closest?.("svg, #which")) busy = Date.now();
  });
}
function pass() {
  const age = Date.now() / 1000 - status.dataset.written;
  const lost = age > Math.max(120, 12 * status.dataset.every);
  status.textContent = text + (lost
    ? `: no news for ${Math.round(age / 60)} min, so it was stopped or is busy elsewhere`
    : `, seen ${Math.max(0, Math.round(age))} s ago`);
  const reading = Date.now() - busy < 4000 || String(getSelection()) !== "";
  const due = performance.now() / 1000 > status.dataset.every * (lost ? 6 : 1);
  if (due && !document.hidden && !reading) location.reload();
}
if (status.dataset.live === "1") {
  pass();
  setInterval(pass, Math.min(2000, 400 * status.dataset.every));
}

const items = [...document.querySelectorAll("#samples li")].reverse(), which = get("which");
if (which) {
  get("pick").hidden = false;
  const show = () => {
    items.forEach((item, j) => { item.hidden = j !== Number(which.value); });
    get("when").textContent = items[which.value].querySelector("p").textContent;
    which.setAttribute("aria-valuetext", get("when").textContent);
  };
  const kept = memory.read("step");
  const place = kept === null ? -1
    : items.findIndex(item => item.querySelector("p").textContent === kept);
  which.value = place < 0 ? items.length - 1 : place;
  which.addEventListener("input", () => {
    busy = Date.now();
    show();
    const newest = Number(which.value) === items.length - 1;  // follows what comes
    memory.write("step", newest ? "" : get("when").textContent);
  });
  show();
}

["linear", "log"].forEach(name => {
  const choice = get("to-" + name);
  if (!choice) return;
  if (memory.read("axis") === name) choice.checked = true;
  choice.addEventListener("change", () => memory.write("axis", name));
});
