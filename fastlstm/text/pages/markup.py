"""What the HTML pages share: one file, no network, light and dark, and no text taken as markup.

``templates/`` holds a page's markup (Jinja2, which escapes every value), its style and its scripts.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# What no page can show is seen as its control picture; a newline and a tab stay.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def _shown(value: Any) -> Any:
    return value.translate(_PICTURES) if type(value) is str else value


@functools.cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("fastlstm.text.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    # Values for scripts: `tojson` escapes what could end their block.
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return found


@functools.cache
def source(*names: str) -> Markup:
    """Styles or scripts from ``templates/``, one after another."""
    return Markup("\n".join(_environment().loader.get_source(_environment(), name)[0]  # type: ignore[union-attr]
                            for name in names))  # fmt: skip


def render(template: str, styles: tuple[str, ...], scripts: tuple[str, ...], **values: Any) -> str:
    """A whole page.

    The page may run these scripts and no others, load nothing and connect to nothing, whatever
    stands in ``values``.

    Args:
        template: its file in ``templates/``, which extends ``base.html``.
        styles, scripts: files in ``templates/``; ``style.css`` comes before the styles.
        values: what the template names.
    """
    style, script = source("style.css", *styles), source(*scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = _environment().get_template(template)
    return page.render(style=style, script=script, policy=Markup(policy), **values)
