"""What the HTML pages share: one file, no network, light and dark, and no text taken as markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from typing import Any

# What no page can show is seen as its control picture; a newline and a tab stay.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --muted: #59636e; --line: #d4dae1;
  --card: #f5f7f9; --one: #0a58ca; --two: #b3470b; --plus: 70, 145, 250; --minus: 235, 125, 40; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --fg: #e3e8ee; --muted: #9aa7b4;
  --line: #333c47; --card: #1d232a; --one: #79b0ff; --two: #f5a35c; --plus: 25, 100, 220;
  --minus: 185, 75, 10; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem .8rem; }
.cards dt { color: var(--muted); font-size: .8rem; } .cards dd { margin: 0; font-size: 1.2rem; }
pre, code { font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: .3rem 0;
  padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  unicode-bidi: isolate; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: .5rem 0; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--muted); } .grid { stroke: var(--line); }
.one { stroke: var(--one); fill: none; } .two { stroke: var(--two); fill: none; }
.band { fill: var(--one); opacity: .18; } circle.two { fill: var(--two); }
svg text.one { fill: var(--one); stroke: none; } svg text.two { fill: var(--two); stroke: none; }
summary { cursor: pointer; } [hidden] { display: none; }
button, select, input { font: inherit; }
:focus-visible { outline: 2px solid var(--one); outline-offset: 2px; }
.scroll { overflow-x: auto; }
"""


def text(value: Any) -> str:
    """Any text as text of a page: nothing in it is markup."""
    return html.escape(str(value).translate(_PICTURES))


def data(name: str, value: Any) -> str:
    """Values for a page's script, in a block that no text inside can end."""
    encoded = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{encoded}</script>\n'


def page(title: str, body: str, script: str, style: str = "", refresh: int = 0) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: markup.
        script, style: of this page alone. The page may run this script and no other, load nothing
            and connect to nothing, whatever stands in ``body``.
        refresh: seconds between reloads in a browser without scripts; 0 for none.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    reload = f'<noscript><meta http-equiv="refresh" content="{refresh}"></noscript>\n'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{reload if refresh else ''}<title>{text(title)}</title>\n"
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def table(head: list[str], rows: list[list[Any]], numbers: bool = True) -> str:
    """A table of plain values; all but the first column hold numbers, unless told otherwise."""

    def cells(tag: str, values: list[Any]) -> str:
        mark = ' class="n"' if numbers else ""
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{mark if j else ''}>{text(v)}</{tag}>" for j, v in enumerate(values)
        )

    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>\n{lines}</tbody></table></div>\n'
