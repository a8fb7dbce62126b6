"""What every HTML page promises: it can be read in both themes on narrow and wide windows."""

import base64
from pathlib import Path

SIZES = [(theme, width) for theme in ("light", "dark") for width in (500, 1400)]

# Of every visible piece of text the contrast with what lies behind it, as WCAG 2 defines it; those
# below a limit. Backgrounds that are partly transparent are laid over those of their ancestors.
CONTRASTS = """
const parse = text => {
  const parts = text.match(/[\\d.]+/g).map(Number);
  return [...parts.slice(0, 3), parts.length > 3 ? parts[3] : 1];
};
const over = (top, below) => [0, 1, 2].map(j => top[3] * top[j] + (1 - top[3]) * below[j]);
const luminance = rgb => {
  const [r, g, b] = rgb.map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
function behind(element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const colour = parse(getComputedStyle(e).backgroundColor);
    layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
}
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const elements = [...document.querySelectorAll("input[type=number], select, button")];
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (node.textContent.trim()) elements.push(node.parentElement);
}
let seen = 0;
for (const element of elements) {
  const style = getComputedStyle(element);
  if (!element.getClientRects().length || style.visibility !== "visible") continue;
  if (element.closest("script, style, noscript")) continue;
  const svg = element instanceof SVGElement;
  const colour = parse(svg ? style.fill : style.color);
  for (let e = element; e; e = e.parentElement) colour[3] *= Number(getComputedStyle(e).opacity);
  const below = behind(svg ? element.closest("svg").parentElement : element);
  const value = contrast(over(colour, below), below);
  seen += 1;
  if (!(value >= arguments[0])) {
    found.push(`${element.tagName} "${element.textContent.trim().slice(0, 30)}": ` +
               `${value.toFixed(2)}`);
  }
}
return [seen, found];
"""


def appear(browser, theme, width, height=1000):
    """Have the browser show its page in a theme, and as wide as that."""
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def reset(browser):
    """As it was before :func:`appear`."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def faint(browser, least=4.5):
    """The pieces of text whose contrast is below that."""
    seen, found = browser.execute_script(CONTRASTS, least)
    assert seen > 5  # there is text to look at
    return found


def sideways(browser):
    """By how many pixels the page is wider than its window."""
    return browser.execute_script(
        "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
    )


def check(browser, page, pictures=None):
    """A page of ours is legible in every theme and width, and loads nothing.

    Args:
        page: its file.
        pictures: a folder for screenshots of the whole page, or None.
    """
    try:
        for theme, width in SIZES:
            appear(browser, theme, width)
            browser.get(page.as_uri())
            where = f"{page.name}, {theme}, {width} pixels"
            assert sideways(browser) <= 0, where
            assert not (found := faint(browser)), f"{where}: {found}"
            loaded = "return performance.getEntriesByType('resource').length"
            assert browser.execute_script(loaded) == 0, where
            if pictures:
                picture(browser, Path(pictures) / f"{page.stem}-{theme}-{width}.png")
    finally:
        reset(browser)


def picture(browser, path):
    """A screenshot of the whole page."""
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))
